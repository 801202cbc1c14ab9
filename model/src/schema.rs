//! How the hand-made types appear in the OpenAPI document: text, or a whole number.

use crate::node_prefix::{ClusterPrefix, NodePrefix};
use crate::resource::ImageDigest;
use crate::sealed::RegistryHost;
use crate::secrets::SecretValue;
use crate::*;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

macro_rules! texts {
    ($($name:ty = $pattern:expr;)*) => {$(
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                ObjectBuilder::new().schema_type(Type::String).pattern(Some($pattern)).into()
            }
        }

        impl ToSchema for $name {}
    )*};
}

macro_rules! numbers {
    ($($name:ty;)*) => {$(
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let format = SchemaFormat::KnownFormat(KnownFormat::Int64);
                ObjectBuilder::new().schema_type(Type::Integer).format(Some(format)).minimum(Some(0)).into()
            }
        }

        impl ToSchema for $name {}
    )*};
}

const NAME: &str = "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$";

texts! {
    ClusterId = "^cluster_[0-9a-hjkmnp-tv-z]{26}$";
    OrgId = "^org_[0-9a-hjkmnp-tv-z]{26}$";
    AppId = "^app_[0-9a-hjkmnp-tv-z]{26}$";
    EnvId = "^env_[0-9a-hjkmnp-tv-z]{26}$";
    ReleaseId = "^rel_[0-9a-hjkmnp-tv-z]{26}$";
    DeploymentId = "^dep_[0-9a-hjkmnp-tv-z]{26}$";
    InstanceId = "^inst_[0-9a-hjkmnp-tv-z]{26}$";
    NodeId = "^node_[0-9a-hjkmnp-tv-z]{26}$";
    EdgeId = "^edge_[0-9a-hjkmnp-tv-z]{26}$";
    RouteId = "^rt_[0-9a-hjkmnp-tv-z]{26}$";
    TokenId = "^tok_[0-9a-hjkmnp-tv-z]{26}$";
    UserId = "^usr_[0-9a-hjkmnp-tv-z]{26}$";
    ServiceId = "^sp_[0-9a-hjkmnp-tv-z]{26}$";
    EnrolmentId = "^enr_[0-9a-hjkmnp-tv-z]{26}$";
    ExecGrantId = "^exec_[0-9a-hjkmnp-tv-z]{26}$";
    VolumeId = "^vol_[0-9a-hjkmnp-tv-z]{26}$";
    SnapshotId = "^snap_[0-9a-hjkmnp-tv-z]{26}$";
    RequestId = "^req_[0-9a-hjkmnp-tv-z]{26}$";
    OrgName = NAME;
    AppName = NAME;
    EnvName = NAME;
    ProcessName = NAME;
    PortName = NAME;
    VolumeName = NAME;
    AgentName = NAME;
    Hostname = "^[a-z0-9.-]{1,253}$";
    Digest = "^[0-9a-f]{64}$";
    ImageDigest = "^sha256:[0-9a-f]{64}$";
    ClusterPrefix = "^[0-9a-f:]+/48$";
    NodePrefix = "^[0-9a-f:]+/64$";
    SecretKey = "^[A-Z_][A-Z0-9_]{0,127}$";
    SecretValue = "^[A-Za-z0-9+/]*={0,2}$";
    RegistryHost = "^[a-z0-9.-]+(:[0-9]{1,5})?$";
}

numbers! {
    Revision;
    LogIndex;
    Incarnation;
    MemberId;
    Timestamp;
}

impl PartialSchema for Scope {
    fn schema() -> RefOr<Schema> {
        let names = Self::ALL.iter().map(|s| s.as_str());
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).into()
    }
}

impl ToSchema for Scope {}

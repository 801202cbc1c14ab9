//! The shapes of the requests that we make, as Firecracker publishes them: which fields a body has, of which type, which
//! must be there, and what numbers they may hold.
//!
//! Derived by hand from the OpenAPI document of release 1.16.1,
//! <https://github.com/firecracker-microvm/firecracker/blob/v1.16.1/src/firecracker/swagger/firecracker.yaml>: the
//! definitions that each constant below is named after. Facts only, and only of what is asked for here. A new release is
//! followed by comparing the document's definitions with these.

use serde_json::Value;

/// What a field holds.
enum Kind {
    Text,
    Flag,
    /// A whole number within bounds.
    Number(u64, u64),
    /// One of these words.
    Word(&'static [&'static str]),
    Object(&'static [Field]),
}

struct Field {
    name: &'static str,
    required: bool,
    kind: Kind,
}

const fn must(name: &'static str, kind: Kind) -> Field {
    Field { name, required: true, kind }
}

const fn may(name: &'static str, kind: Kind) -> Field {
    Field { name, required: false, kind }
}

const ANY: Kind = Kind::Number(0, u64::MAX);

const TOKEN_BUCKET: &[Field] = &[
    may("one_time_burst", Kind::Number(0, i64::MAX as u64)),
    must("refill_time", Kind::Number(0, i64::MAX as u64)),
    must("size", Kind::Number(0, i64::MAX as u64)),
];

const RATE_LIMITER: &[Field] =
    &[may("bandwidth", Kind::Object(TOKEN_BUCKET)), may("ops", Kind::Object(TOKEN_BUCKET))];

const MACHINE_CONFIGURATION: &[Field] = &[
    may("cpu_template", Kind::Word(&["C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"])),
    may("smt", Kind::Flag),
    must("mem_size_mib", ANY),
    may("track_dirty_pages", Kind::Flag),
    must("vcpu_count", Kind::Number(1, 32)),
    may("huge_pages", Kind::Word(&["None", "2M"])),
];

const BOOT_SOURCE: &[Field] =
    &[may("boot_args", Kind::Text), may("initrd_path", Kind::Text), must("kernel_image_path", Kind::Text)];

const DRIVE: &[Field] = &[
    must("drive_id", Kind::Text),
    may("partuuid", Kind::Text),
    must("is_root_device", Kind::Flag),
    may("cache_type", Kind::Word(&["Unsafe", "Writeback"])),
    may("is_read_only", Kind::Flag),
    may("path_on_host", Kind::Text),
    may("rate_limiter", Kind::Object(RATE_LIMITER)),
    may("io_engine", Kind::Word(&["Sync", "Async"])),
    may("socket", Kind::Text),
];

const NETWORK_INTERFACE: &[Field] = &[
    may("guest_mac", Kind::Text),
    must("host_dev_name", Kind::Text),
    must("iface_id", Kind::Text),
    may("mtu", Kind::Number(68, 65_535)),
    may("rx_rate_limiter", Kind::Object(RATE_LIMITER)),
    may("tx_rate_limiter", Kind::Object(RATE_LIMITER)),
];

const VSOCK: &[Field] = &[
    must("guest_cid", Kind::Number(3, u32::MAX as u64)),
    must("uds_path", Kind::Text),
    may("vsock_id", Kind::Text),
];

const ENTROPY_DEVICE: &[Field] = &[may("rate_limiter", Kind::Object(RATE_LIMITER))];

const INSTANCE_ACTION_INFO: &[Field] =
    &[must("action_type", Kind::Word(&["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]))];

/// What is PUT where. The last part of a path in braces is the body's field of that name.
const REQUESTS: &[(&str, &[Field])] = &[
    ("/machine-config", MACHINE_CONFIGURATION),
    ("/boot-source", BOOT_SOURCE),
    ("/drives/{drive_id}", DRIVE),
    ("/network-interfaces/{iface_id}", NETWORK_INTERFACE),
    ("/vsock", VSOCK),
    ("/entropy", ENTROPY_DEVICE),
    ("/actions", INSTANCE_ACTION_INFO),
];

/// Whether a request is one that is published.
pub(super) fn check(uri: &str, body: &Value) -> Result<(), String> {
    for (path, fields) in REQUESTS {
        let Some((folder, parameter)) = path.split_once('{') else {
            if *path == uri {
                return object(body, fields);
            }
            continue;
        };
        if let Some(named) = uri.strip_prefix(folder) {
            let field = parameter.trim_end_matches('}');
            if body.get(field).and_then(Value::as_str) != Some(named) {
                return Err(format!("the path says {named} and {field} says something else"));
            }
            return object(body, fields);
        }
    }
    Err("there is no such path".to_owned())
}

fn object(body: &Value, fields: &[Field]) -> Result<(), String> {
    let given = body.as_object().ok_or("not an object")?;
    if let Some(unknown) = given.keys().find(|key| !fields.iter().any(|field| field.name == key.as_str())) {
        return Err(format!("{unknown} is not known"));
    }
    for field in fields {
        match given.get(field.name) {
            Some(value) => holds(value, &field.kind).map_err(|why| format!("{}: {why}", field.name))?,
            None if field.required => return Err(format!("{} is missing", field.name)),
            None => {}
        }
    }
    Ok(())
}

fn holds(value: &Value, kind: &Kind) -> Result<(), String> {
    let fits = match kind {
        Kind::Text => value.is_string(),
        Kind::Flag => value.is_boolean(),
        Kind::Number(least, most) => value.as_u64().is_some_and(|number| (*least..=*most).contains(&number)),
        Kind::Word(words) => value.as_str().is_some_and(|word| words.contains(&word)),
        Kind::Object(fields) => return object(value, fields),
    };
    if fits { Ok(()) } else { Err(format!("{value} does not fit")) }
}

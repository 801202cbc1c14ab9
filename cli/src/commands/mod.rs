//! What each command does. Commands of the API are thin: resolve names, ask, print.

pub(crate) mod app;
pub(crate) mod ca;
pub(crate) mod completions;
pub(crate) mod confirm;
pub(crate) mod deploy;
pub(crate) mod deployments;
pub(crate) mod edge;
pub(crate) mod env;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod image;
pub(crate) mod instances;
pub(crate) mod invite;
pub(crate) mod login;
pub(crate) mod logs;
pub(crate) mod members;
pub(crate) mod node;
pub(crate) mod openapi;
pub(crate) mod org;
pub(crate) mod releases;
pub(crate) mod rollout;
pub(crate) mod route;
pub(crate) mod scale;
pub(crate) mod secret_text;
pub(crate) mod status;
pub(crate) mod token;

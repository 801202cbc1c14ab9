//! Bodies of requests, as the API and the agents' endpoints read them.
#![no_main]

use holdfast_model::agent::{CallAnswer, Report};
use holdfast_model::api::{
    CreateApp, CreateDeployment, CreateEnrolment, CreateRelease, CreateRoute, CreateToken, Enrol, Renew, Scale,
};
use libfuzzer_sys::fuzz_target;

macro_rules! read {
    ($bytes:ident: $($body:ty),*) => {$(
        if let Ok(body) = serde_json::from_slice::<$body>($bytes) {
            // What was understood once is understood again: nothing is lost between two members.
            let text = serde_json::to_vec(&body).unwrap_or_default();
            assert!(serde_json::from_slice::<$body>(&text).is_ok_and(|again| again == body));
        }
    )*};
}

fuzz_target!(|bytes: &[u8]| {
    read!(bytes: Enrol, Renew, CreateApp, CreateRelease, CreateDeployment, CreateRoute, CreateToken, CreateEnrolment,
        Scale, Report, CallAnswer);
});

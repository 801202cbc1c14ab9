//! `holdfast server openapi`: the API's document, as it is checked in.

use crate::failure::{Failure, with_sources};
use std::io::Write;

pub(crate) fn run(access: bool) -> Result<(), Failure> {
    let text = if access {
        holdfast_api::access_text()
    } else {
        holdfast_api::openapi_text().map_err(|e| Failure::Host(with_sources(&e)))?
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(Failure::Output)
}

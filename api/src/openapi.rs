//! The OpenAPI document, made from the endpoints' declarations.

use crate::endpoint::{Endpoint, Need};
use axum::http::Method;
use holdfast_model::Code;
use holdfast_model::api::{PROBLEM_MEDIA_TYPE, Problem};
use std::collections::BTreeMap;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn, PathItemBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, HttpMethod, InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder, Required,
    ResponseBuilder,
};
use utoipa::{PartialSchema, ToSchema};

const BEARER: &str = "bearer";
const AGENT: &str = "agent_certificate";

/// The document for these endpoints.
pub fn document(endpoints: &[Endpoint]) -> OpenApi {
    let mut schemas = BTreeMap::from([(Problem::name().into_owned(), Problem::schema())]);
    let mut paths: BTreeMap<&str, PathItemBuilder> = BTreeMap::new();
    for endpoint in endpoints {
        schemas.extend(endpoint.schemas.clone());
        let item = paths.remove(endpoint.path).unwrap_or_default();
        paths.insert(
            endpoint.path,
            item.operation(http_method(&endpoint.method), operation(endpoint).build()),
        );
    }
    let paths = paths.into_iter().fold(PathsBuilder::new(), |p, (path, item)| p.path(path, item.build()));
    let mut components = ComponentsBuilder::new()
        .security_scheme(BEARER, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)))
        .security_scheme(
            AGENT,
            SecurityScheme::MutualTls {
                description: Some("A client certificate from the cluster's CA.".into()),
                extensions: None,
                deprecated: None,
            },
        );
    for (name, schema) in schemas {
        components = components.schema(name, schema);
    }
    let info = InfoBuilder::new()
        .title("Holdfast")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("The control plane's HTTP API. Errors are RFC 9457 problems with stable codes."))
        .build();
    OpenApiBuilder::new().info(info).paths(paths.build()).components(Some(components.build())).build()
}

/// The document as the text that is checked in.
///
/// # Errors
/// When it cannot be written as JSON, which no document that was built here does.
pub fn document_text(endpoints: &[Endpoint]) -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(&document(endpoints))?;
    text.push('\n');
    Ok(text)
}

/// The access table that is checked in: each endpoint and what a caller needs.
pub fn access_table(endpoints: &[Endpoint]) -> String {
    let mut lines: Vec<_> = endpoints
        .iter()
        .map(|e| format!("| {} | `{}` | {} |", e.method, e.path, e.need.describe()))
        .collect();
    lines.sort();
    format!(
        "# Who may call what\n\nMade from the endpoints' declarations by `cargo xtask openapi`; reviewed as a diff.\n\n\
         | method | path | needs |\n|---|---|---|\n{}\n",
        lines.join("\n")
    )
}

fn http_method(method: &Method) -> HttpMethod {
    match *method {
        Method::POST => HttpMethod::Post,
        Method::DELETE => HttpMethod::Delete,
        _ => HttpMethod::Get,
    }
}

fn operation(endpoint: &Endpoint) -> OperationBuilder {
    let mut operation =
        OperationBuilder::new().summary(Some(endpoint.summary)).operation_id(Some(operation_id(endpoint)));
    let text = || ObjectBuilder::new().schema_type(Type::String);
    for name in endpoint.path_params() {
        let parameter =
            ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path).required(Required::True);
        operation = operation.parameter(parameter.schema(Some(text())));
    }
    for (name, meaning) in endpoint.parameters() {
        let parameter =
            ParameterBuilder::new().name(name).parameter_in(ParameterIn::Query).description(Some(meaning));
        operation = operation.parameter(parameter.schema(Some(text())));
    }
    if endpoint.method != Method::GET && matches!(endpoint.need, Need::Scope(_) | Need::Operator(_)) {
        let parameter = ParameterBuilder::new()
            .name(holdfast_model::api::IDEMPOTENCY_HEADER)
            .parameter_in(ParameterIn::Header)
            .description(Some("Makes a repeat of this request answer what the first one did."));
        operation = operation.parameter(parameter.schema(Some(text())));
    }
    if let Some(name) = &endpoint.body {
        let content = ContentBuilder::new().schema(Some(Endpoint::reference(name))).build();
        let body =
            RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True));
        operation = operation.request_body(Some(body.build()));
    }
    let mut success = ResponseBuilder::new().description("Done.");
    if let Some(name) = &endpoint.answer {
        let content = ContentBuilder::new().schema(Some(Endpoint::reference(name))).build();
        success = success.content("application/json", content);
    }
    operation = operation.response(endpoint.status.to_string(), success.build());
    for (status, codes) in problems(endpoint) {
        let content = ContentBuilder::new().schema(Some(Endpoint::reference(&Problem::name()))).build();
        let response = ResponseBuilder::new().description(codes).content(PROBLEM_MEDIA_TYPE, content).build();
        operation = operation.response(status.to_string(), response);
    }
    match endpoint.need {
        Need::AnyToken | Need::Scope(_) | Need::Operator(_) => {
            operation.security(SecurityRequirement::new(BEARER, Vec::<String>::new()))
        }
        Need::Agent | Need::Member => {
            operation.security(SecurityRequirement::new(AGENT, Vec::<String>::new()))
        }
        Need::Nothing | Need::EnrolmentSecret => operation,
    }
}

/// Every status that a problem may have here, with its codes.
fn problems(endpoint: &Endpoint) -> BTreeMap<u16, String> {
    let mut by_status: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for code in Code::ALL {
        if endpoint.need == Need::Nothing && !matches!(code, Code::Unavailable | Code::Internal) {
            continue;
        }
        by_status.entry(code.status()).or_default().push(code.as_str());
    }
    by_status.into_iter().map(|(status, codes)| (status, format!("One of: {}.", codes.join(", ")))).collect()
}

fn operation_id(endpoint: &Endpoint) -> String {
    let path = endpoint.path.trim_start_matches("/v1/").trim_start_matches('/').replace(['{', '}'], "");
    format!("{}_{}", endpoint.method.as_str().to_ascii_lowercase(), path.replace(['/', '.'], "_"))
}

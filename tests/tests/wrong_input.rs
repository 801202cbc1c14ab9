//! I14 through the command line: wrong input is answered with a stable code, an exit code of its class and a sentence,
//! and leaves the cluster as it was.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_identity::CaCertificate;
use holdfast_model::Revision;
use holdfast_tests::cluster::{Cluster, Options};
use holdfast_tests::netns;
use serde_json::Value;

/// Runs with `--json` and returns the exit code, the stable code and the message.
fn refused(cluster: &Cluster, arguments: &[&str]) -> (i32, String, String) {
    let mut all = vec!["--json"];
    all.extend(arguments);
    let output = cluster.holdfast(&all).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let report: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_default();
    let field = |name: &str| report[name].as_str().unwrap_or_default().to_owned();
    assert_eq!(report["exit"].as_i64().map(|e| e as i32), output.status.code(), "{arguments:?}: {text}");
    (output.status.code().unwrap(), field("code"), field("message"))
}

fn accepted(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = cluster.holdfast(arguments).unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn revision(cluster: &Cluster) -> Revision {
    cluster.client().unwrap().events(Revision(0), 1).await.unwrap().revision
}

#[tokio::test]
async fn i14_wrong_input_has_stable_codes_and_changes_nothing() {
    netns::enter().unwrap();
    let cluster = Cluster::start(Options::SERVERS).unwrap();
    accepted(&cluster, &["org", "create", "acme"]);
    accepted(&cluster, &["app", "create", "shop"]);
    accepted(&cluster, &["env", "create", "prod", "--app", "shop"]);
    let manifest = |name: &str, text: &str| {
        let path = cluster.data_dir().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let unknown_key =
        manifest("unknown.toml", "schema_version = \"v1\"\n[app]\nname = \"shop\"\nnmae = \"x\"\n");
    let other_app = manifest(
        "other.toml",
        "schema_version = \"v1\"\n[app]\nname = \"other\"\n[processes.web]\nresources = { memory = \"64Mi\" }\n",
    );
    let not_a_token = manifest("token", "holdfast_op_nonsense");
    let foreign_token = manifest("foreign", &foreign_token());
    let ca = cluster.record().ca_file.display().to_string();
    let server = cluster.record().servers[0].clone();
    let login = |token: &str| {
        let context = cluster.data_dir().join("other-context.json").display().to_string();
        let arguments =
            ["login", "--context", &context, "--server", &server, "--ca-file", &ca, "--token-file", token];
        let answer = refused(&cluster, &arguments);
        assert!(!std::path::Path::new(&context).exists(), "a login that was refused is not kept");
        answer
    };

    let before = revision(&cluster).await;
    let cases: &[(&[&str], i32, &str)] = &[
        (&["org", "create", "acme"], 5, "name_taken"),
        (&["app", "create", "shop"], 5, "name_taken"),
        (&["app", "create", "x", "--org", "nobody"], 4, "not_found"),
        (&["app", "create", "x", "--org", "org_00000000000000000000000000"], 4, "not_found"),
        (&["env", "list", "--app", "nothing"], 4, "not_found"),
        (&["env", "list"], 2, "unnamed"),
        (&["app", "delete", "shop", "--no-input"], 2, "usage"),
        (&["deploy", "--file", &unknown_key, "--app", "shop"], 2, "invalid_manifest"),
        (&["deploy", "--file", &other_app, "--app", "shop", "--image", "127.0.0.1:1/x:1"], 2, "usage"),
        (&["deploy", "--file", "/nonexistent.toml"], 1, "file"),
        (&["scale", "--app", "shop", "--env", "prod", "web=2"], 5, "failed_precondition"),
        (
            &["route", "add", "shop.example", "--port", "https", "--app", "shop", "--listen", "22"],
            2,
            "invalid_request",
        ),
        (&["route", "remove", "shop.example", "--app", "shop"], 4, "not_found"),
        (&["logs", "--instance", "inst_00000000000000000000000000"], 4, "not_found"),
        (&["logs", "--instance", "shop"], 2, "usage"),
        (&["server", "rebuild", "--to", "999999999"], 2, "invalid_request"),
        (&["server", "verify", "--data-dir", "/nonexistent"], 2, "usage"),
        (&["server", "rebuild", "--data-dir", "/nonexistent", "--to", "1"], 2, "usage"),
        (&["node", "drain", "nobody"], 4, "not_found"),
        (&["confirm", "edge", "nobody", "--yes"], 4, "not_found"),
        (&["token", "revoke", "tok_00000000000000000000000000"], 4, "not_found"),
        (&["token", "create", "t", "--role", "viewer", "--ttl", "900d"], 2, "invalid_request"),
    ];
    for (arguments, exit, code) in cases {
        let (seen_exit, seen_code, message) = refused(&cluster, arguments);
        assert_eq!((seen_exit, seen_code.as_str()), (*exit, *code), "{arguments:?}: {message}");
        assert!(message.ends_with('.') && message.len() > 15, "{arguments:?}: «{message}» is no sentence");
    }
    let line = refused(&cluster, &["deploy", "--file", &unknown_key]).2;
    assert!(line.contains("line 4"), "{line}");
    assert_eq!(login(&not_a_token).0, 2);
    let (exit, code, _) = login(&foreign_token);
    assert_eq!((exit, code.as_str()), (3, "unauthenticated"));
    // Refused by the command line itself, before anything is sent.
    for arguments in [
        &["org", "create", "No_Name"] as &[&str],
        &["scale", "web"],
        &["frobnicate"],
        &["deploy", "--wat"],
        &["server", "rebuild"],
        &["server", "rebuild", "--to", "-1"],
    ] {
        assert_eq!(cluster.holdfast(arguments).unwrap().status.code(), Some(2), "{arguments:?}");
    }
    assert_eq!(revision(&cluster).await, before, "nothing of this changed anything");
}

/// A token in the right form that no cluster gave.
fn foreign_token() -> String {
    let token = holdfast_identity::Token::generate(holdfast_identity::TokenKind::Operator).unwrap();
    token.reveal().to_string()
}

#[tokio::test]
async fn i09_i11_a_token_reaches_its_own_org_alone_until_it_is_revoked() {
    netns::enter().unwrap();
    let cluster = Cluster::start(Options::SERVERS).unwrap();
    for org in ["acme", "other"] {
        accepted(&cluster, &["org", "create", org]);
        accepted(&cluster, &["app", "create", "shop", "--org", org]);
    }
    let token_file = cluster.data_dir().join("dev.token").display().to_string();
    let create =
        ["--json", "--org", "acme", "token", "create", "dev", "--role", "developer", "--out", &token_file];
    let token: Value = serde_json::from_str(&accepted(&cluster, &create)).unwrap();
    let context = cluster.data_dir().join("dev-context.json").display().to_string();
    let ca = cluster.record().ca_file.display().to_string();
    let server = &cluster.record().servers[1];
    // By the CA's fingerprint alone, as on a machine that has nothing of the cluster yet.
    let pem = std::fs::read_to_string(&ca).unwrap();
    let pin = CaCertificate::from_pem(&pem).unwrap().fingerprint().to_string();
    let login = |pin| {
        let context = ["--context", &context, "login", "--server", server];
        cluster.holdfast(&[&context[..], &["--ca-pin", pin, "--token-file", &token_file]].concat()).unwrap()
    };
    let wrong_pin = format!("sha256:{}", "0".repeat(64));
    assert_eq!(login(&wrong_pin).status.code(), Some(1), "another CA is not trusted");
    assert!(login(&pin).status.success());

    let own = accepted(&cluster, &["--context", &context, "app", "list"]);
    assert!(own.contains("shop"), "{own}");
    let as_dev = |arguments: &[&str]| {
        let mut all = vec!["--context", context.as_str()];
        all.extend(arguments);
        refused(&cluster, &all)
    };
    let foreign = as_dev(&["app", "list", "--org", "other"]);
    let absent = as_dev(&["app", "list", "--org", "absent"]);
    assert_eq!((foreign.0, &foreign.1), (4, &absent.1), "another's org looks like none");
    assert_eq!(foreign.2.replace("other", "absent"), absent.2);
    assert_eq!(as_dev(&["token", "list"]).0, 3, "a developer grants nothing");
    assert_eq!(as_dev(&["status"]).0, 3, "a tenant does not see the cluster");

    accepted(&cluster, &["token", "revoke", token["id"].as_str().unwrap()]);
    for server in &cluster.record().servers {
        let login = [
            "--context",
            &context,
            "login",
            "--server",
            server,
            "--ca-file",
            &ca,
            "--token-file",
            &token_file,
        ];
        let (exit, code, _) = refused(&cluster, &login);
        assert_eq!((exit, code.as_str()), (3, "unauthenticated"), "every member refuses it at once");
    }
}

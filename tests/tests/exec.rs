//! `holdfast exec` into real microVMs: as over ssh, for whom it was granted, once, and for as long as it is.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_client::{Client, ExecStream};
use holdfast_identity::{CaCertificate, Token};
use holdfast_model::api::{CreateExecGrant, CreateToken, CreatedExecGrant};
use holdfast_model::exec::{ExecClass, ExecEnd, ExecInput, ExecOutput, ExecProgram};
use holdfast_model::{EventPayload, InstanceId, Revision, Role, TokenId};
use holdfast_tests::cluster::{Cluster, Options, binary, signal, wait_for};
use holdfast_tests::netns;
use holdfast_tests::oci::{Registry, busybox};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(120);

const MANIFEST: &str = r#"schema_version = "v1"

[app]
name = "shop"

[processes.web]
command = ["sleep", "100000"]
user = "web"
workdir = "/srv"
resources = { memory = "64Mi", cpu = 0.5 }
scaling = { min = 2, max = 4 }
vars = { GREETING = "hello" }
"#;

struct Tenant {
    cluster: Cluster,
    /// The tenant's own token, in a context file of its own.
    context: std::path::PathBuf,
    client: Client,
    token: TokenId,
}

/// Runs `holdfast` with a login, and with what is to come on standard input.
fn command(context: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary().unwrap());
    command
        .args(["--org", "acme", "--app", "shop", "--env", "prod"])
        .args(arguments)
        .env("HOLDFAST_CONTEXT", context)
        .env("TERM", "vt100")
        .stdin(Stdio::null());
    command
}

impl Tenant {
    fn run(&self, arguments: &[&str]) -> Output {
        command(&self.context, arguments).output().unwrap()
    }

    fn with_input(&self, arguments: &[&str], input: Vec<u8>) -> Output {
        let mut command = command(&self.context, arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writing = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        writing.join().unwrap().unwrap();
        output
    }

    async fn granted(&self, client: &Client, session_s: Option<u64>) -> CreatedExecGrant {
        let body = CreateExecGrant { class: ExecClass::Program, terminal: false, session_s };
        client.create_exec_grant(self.instance().await, &body).await.unwrap().item
    }

    async fn instance(&self) -> InstanceId {
        let output = self.run(&["--json", "instances"]);
        let instances: Value = serde_json::from_slice(&output.stdout).unwrap();
        let all = instances.as_array().unwrap();
        let ready = all.iter().find(|i| i["state"] == "ready").expect("one is ready");
        ready["id"].as_str().unwrap().parse().unwrap()
    }

    /// How sessions ended so far, in order.
    async fn ends(&self) -> Vec<(ExecEnd, Option<i32>)> {
        let (mut ends, mut after) = (Vec::new(), Revision(0));
        loop {
            let page = self.client.events(after, 200).await.unwrap();
            let Some(last) = page.items.last() else { return ends };
            after = last.revision;
            ends.extend(page.items.iter().filter_map(|event| match event.payload {
                EventPayload::ExecEnded { end, code, .. } => Some((end, code)),
                _ => None,
            }));
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn open(made: &CreatedExecGrant, argv: &[&str]) -> ExecInput {
    let argv = argv.iter().map(|word| (*word).to_owned()).collect();
    ExecInput::Open { secret: made.secret.clone(), program: ExecProgram { argv, terminal: None } }
}

type Stream = ExecStream<ExecInput, ExecOutput>;

/// Hears a session to its end: what was said, and how it ended.
async fn to_end(stream: &mut Stream) -> (String, ExecEnd, String) {
    let mut said = Vec::new();
    let hear = async {
        loop {
            match stream.receiver.next().await.unwrap().expect("the last frame says how it ended") {
                ExecOutput::Stdout(bytes) => said.extend(bytes),
                ExecOutput::Ended { end, reason } => return (end, reason),
                _ => {}
            }
        }
    };
    let (end, reason) = tokio::time::timeout(COME_MAX, hear).await.expect("the session goes on");
    (text(&said), end, reason)
}

async fn until_said(stream: &mut Stream, wanted: &str) {
    let hear = async {
        let mut said = String::new();
        while !said.contains(wanted) {
            match stream.receiver.next().await.unwrap() {
                Some(ExecOutput::Stdout(bytes)) => said.push_str(&text(&bytes)),
                Some(ExecOutput::Started) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(COME_MAX, hear).await.expect("it was not said");
}

async fn start() -> Tenant {
    let registry = Registry::start().await.unwrap();
    let account = busybox::Account { name: "web", id: 33, home: "/srv" };
    let programs = ["sh", "cat", "echo", "id", "pwd", "sleep", "seq", "stty", "tty", "kill"];
    let image = busybox::push(registry.host(), "team/shop", account, &programs).await.unwrap();

    let cluster = Cluster::start(Options::WHOLE).unwrap();
    let operator = cluster.client().unwrap();
    for make in [&["org", "create", "acme"][..], &["--org", "acme", "app", "create", "shop"]] {
        assert!(cluster.holdfast(make).unwrap().status.success(), "{make:?}");
    }
    let made = cluster.holdfast(&["--org", "acme", "--app", "shop", "env", "create", "prod"]).unwrap();
    assert!(made.status.success());
    let org = operator.orgs(Some("acme")).await.unwrap().items[0].id;
    let body = CreateToken {
        name: "ann".parse().unwrap(),
        org: Some(org),
        role: Some(Role::Owner),
        scopes: Default::default(),
        ttl_s: 3600,
    };
    let made = operator.create_token(&body).await.unwrap().item;
    let context = cluster.data_dir().join("ann.json");
    let secret = cluster.data_dir().join("ann.token");
    std::fs::write(&secret, &made.secret).unwrap();
    let record = cluster.record();
    let mut login = Command::new(binary().unwrap());
    login.arg("login").env("HOLDFAST_CONTEXT", &context).stdin(Stdio::null());
    for server in &record.servers {
        login.args(["--server", server]);
    }
    login.arg("--ca-file").arg(&record.ca_file).arg("--token-file").arg(&secret);
    let logged_in = login.output().unwrap();
    assert!(logged_in.status.success(), "{}", text(&logged_in.stderr));
    let ca = CaCertificate::from_pem(&std::fs::read_to_string(&record.ca_file).unwrap()).unwrap();
    let endpoints = record.servers.iter().map(|s| s.parse().unwrap()).collect();
    let client = Client::new(endpoints, &ca, Some(&Token::parse(&made.secret).unwrap())).unwrap();
    let tenant = Tenant { cluster, context, client, token: made.token.id };

    let manifest = tenant.cluster.data_dir().join("exec.toml");
    std::fs::write(&manifest, MANIFEST).unwrap();
    let deployed = tenant.run(&["deploy", "--file", manifest.to_str().unwrap(), "--image", &image.reference]);
    assert!(deployed.status.success(), "{}{}", text(&deployed.stderr), tenant.cluster.log_ends());
    tenant
}

/// A child on a terminal of its own.
struct OnTerminal {
    child: Child,
    master: std::fs::File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl OnTerminal {
    fn start(mut command: Command, rows: u16, columns: u16) -> OnTerminal {
        use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        resize(&master, rows, columns);
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        let child = command.spawn().unwrap();
        drop(command);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, shared) = (std::fs::File::from(master.try_clone().unwrap()), Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(bytes @ 1..) = reader.read(&mut buffer) {
                shared.lock().unwrap().extend_from_slice(&buffer[..bytes]);
            }
        });
        OnTerminal { child, master: master.into(), seen }
    }

    fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn until(&self, wanted: &str) {
        let seen = || text(&self.seen.lock().unwrap());
        let found = wait_for(wanted, COME_MAX, || seen().contains(wanted).then_some(()));
        assert!(found.is_ok(), "{wanted:?} is not in {:?}", seen());
    }

    fn exits(mut self) -> Option<i32> {
        let ended = wait_for("the command to end", COME_MAX, || self.child.try_wait().unwrap());
        ended.unwrap_or_else(|e| panic!("{e}: {:?}", text(&self.seen.lock().unwrap()))).code()
    }
}

fn resize(master: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(master, size).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i11_i12_programs_run_in_instances_as_over_ssh_and_only_while_they_may() {
    netns::enter().unwrap();
    let mut tenant = start().await;
    like_ssh(&tenant);
    on_a_terminal(&tenant);
    for_whom_and_how_often(&tenant).await;
    // Ends one instance's time, and in the end the token.
    while_they_may(&mut tenant).await;
}

fn like_ssh(tenant: &Tenant) {
    let ran =
        tenant.run(&["exec", "web", "--", "sh", "-c", "id -u; pwd; echo $GREETING; echo oops >&2; exit 7"]);
    assert_eq!(ran.status.code(), Some(7), "{}", text(&ran.stderr));
    assert_eq!((text(&ran.stdout).as_str(), text(&ran.stderr).as_str()), ("33\n/srv\nhello\n", "oops\n"));
    let killed = tenant.run(&["exec", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.status.code(), Some(137), "{}", text(&killed.stderr));
    // The end of the input is passed on.
    let read = tenant.with_input(&["exec", "--", "cat"], b"some words".to_vec());
    assert_eq!((read.status.code(), text(&read.stdout).as_str()), (Some(0), "some words"));
    // A mebibyte both ways.
    let sent: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let echoed = tenant.with_input(&["exec", "--", "cat"], sent.clone());
    assert_eq!(echoed.status.code(), Some(0), "{}", text(&echoed.stderr));
    assert!(echoed.stdout == sent, "{} bytes came back", echoed.stdout.len());
    let absent = tenant.run(&["exec", "web", "--", "/bin/nothing"]);
    assert_eq!(absent.status.code(), Some(5), "{}", text(&absent.stderr));
    assert!(text(&absent.stderr).contains("'/bin/nothing' could not be started"), "{}", text(&absent.stderr));
    assert_eq!(tenant.run(&["exec", "worker", "--", "id"]).status.code(), Some(4));
    let told = tenant.run(&["--json", "exec", "--", "sh", "-c", "exit 3"]);
    let told: Value = serde_json::from_str(text(&told.stderr).trim()).unwrap();
    assert_eq!((told["end"].as_str(), told["code"].as_i64()), (Some("exited"), Some(3)));
}

fn on_a_terminal(tenant: &Tenant) {
    let mut shell = OnTerminal::start(command(&tenant.context, &["exec", "web"]), 33, 101);
    shell.types("stty size; echo is $TERM; id -u\r");
    shell.until("33 101");
    shell.until("is vt100");
    resize(&shell.master, 44, 122);
    signal(shell.child.id(), Signal::WINCH);
    shell.types("sleep 1; stty size\r");
    shell.until("44 122");
    // ^C goes to the program there, not to the command here.
    shell.types("sh -c 'echo it'' runs; sleep 1000'; echo 'af'ter\r");
    shell.until("it runs");
    shell.types("\x03");
    shell.types("echo 'st'ill here\r");
    shell.until("still here");
    shell.types("exit 9\r");
    assert_eq!(shell.exits(), Some(9));
    // And a way out of one that hangs.
    let mut hangs = OnTerminal::start(
        command(&tenant.context, &["exec", "--", "sh", "-c", "echo up; sleep 1000"]),
        24,
        80,
    );
    hangs.until("up");
    hangs.types("\r~.");
    assert_eq!(hangs.exits(), Some(1));
}

async fn for_whom_and_how_often(tenant: &Tenant) {
    // Used up by its first use, through whichever member.
    let made = tenant.granted(&tenant.client, None).await;
    let mut first = tenant.client.exec(made.grant.id, &open(&made, &["echo", "once"])).await.unwrap();
    assert_eq!(to_end(&mut first).await.0, "once\n");
    let again = tenant.client.exec(made.grant.id, &open(&made, &["echo", "twice"])).await.unwrap_err();
    assert!(again.is_not_found(), "{again}");
    let made = tenant.granted(&tenant.client, None).await;
    let held = tenant.client.exec(made.grant.id, &open(&made, &["sleep", "1000"])).await.unwrap();
    let again = tenant.client.exec(made.grant.id, &open(&made, &["echo", "twice"])).await.unwrap_err();
    assert!(again.to_string().contains("used already"), "{again}");
    // Ended by somebody else, by its id.
    let id = made.grant.id.to_string();
    assert!(text(&tenant.run(&["exec", "--list"]).stdout).contains(&id));
    assert!(tenant.run(&["exec", "--end", &id]).status.success());
    let mut held = held;
    let (_, end, reason) = to_end(&mut held).await;
    assert_eq!((end, reason.as_str()), (ExecEnd::Revoked, "The exec session was ended by somebody else."));

    // To another org neither the instance nor the grant is there; nor does an operator use somebody's grant.
    let operator = tenant.cluster.client().unwrap();
    let other = operator
        .create_org(&holdfast_model::api::CreateOrg { name: "other".parse().unwrap() })
        .await
        .unwrap();
    let body = CreateToken {
        name: "bob".parse().unwrap(),
        org: Some(other.item.id),
        role: Some(Role::Owner),
        scopes: Default::default(),
        ttl_s: 3600,
    };
    let theirs = operator.create_token(&body).await.unwrap().item;
    let ca =
        CaCertificate::from_pem(&std::fs::read_to_string(&tenant.cluster.record().ca_file).unwrap()).unwrap();
    let endpoints = tenant.cluster.record().servers.iter().map(|s| s.parse().unwrap()).collect();
    let theirs = Client::new(endpoints, &ca, Some(&Token::parse(&theirs.secret).unwrap())).unwrap();
    let body = CreateExecGrant { class: ExecClass::Program, terminal: false, session_s: None };
    let refused = theirs.create_exec_grant(tenant.instance().await, &body).await.unwrap_err();
    assert!(refused.is_not_found(), "{refused}");
    let made = tenant.granted(&tenant.client, None).await;
    for stranger in [&theirs, &operator] {
        let refused = stranger.exec(made.grant.id, &open(&made, &["id"])).await.unwrap_err();
        assert!(refused.is_not_found(), "{refused}");
    }
    let wrong =
        CreatedExecGrant { secret: tenant.granted(&tenant.client, None).await.secret, ..made.clone() };
    assert!(tenant.client.exec(made.grant.id, &open(&wrong, &["id"])).await.unwrap_err().is_not_found());
    // Not for anything else than it was made for.
    let shell = tenant.client.exec(made.grant.id, &open(&made, &[])).await.unwrap_err();
    assert!(shell.to_string().contains("for something else"), "{shell}");
    // Two at a time in one instance.
    let refused = tenant.client.create_exec_grant(tenant.instance().await, &body).await.unwrap_err();
    assert_eq!(refused.code(), "quota_exceeded");
    let mut left = tenant.client.exec(made.grant.id, &open(&made, &["id", "-u"])).await.unwrap();
    assert_eq!(to_end(&mut left).await.0, "33\n");
}

async fn while_they_may(tenant: &mut Tenant) {
    // What was asked for and not used is in the way until it is over.
    wait_for_no_grants(tenant).await;
    let made = tenant.granted(&tenant.client, Some(2)).await;
    let mut timed = tenant.client.exec(made.grant.id, &open(&made, &["sleep", "1000"])).await.unwrap();
    let (_, end, reason) = to_end(&mut timed).await;
    assert_eq!(end, ExecEnd::Timeout, "{reason}");

    // An agent that is restarted takes its sessions along, and says so; the instance is not touched.
    let before = tenant.instance().await;
    let made = tenant.granted(&tenant.client, None).await;
    let mut cut =
        tenant.client.exec(made.grant.id, &open(&made, &["sh", "-c", "echo up; sleep 1000"])).await.unwrap();
    until_said(&mut cut, "up").await;
    let node = tenant.cluster.names("node");
    tenant.cluster.kill(&node).unwrap();
    let (_, end, reason) = to_end(&mut cut).await;
    assert_eq!(end, ExecEnd::Lost);
    assert!(reason.contains("agent was restarted, or cannot be reached"), "{reason}");
    tenant.cluster.restart(&node[0]).unwrap();
    let again = wait_for("the agent to be back", COME_MAX, || {
        let ran = tenant.run(&["exec", &before.to_string(), "--", "echo", "back"]);
        ran.status.success().then(|| text(&ran.stdout))
    });
    assert_eq!(again.unwrap(), "back\n", "the same instance runs on");

    // With the token goes everything that it opened.
    let made = tenant.granted(&tenant.client, None).await;
    let mut live =
        tenant.client.exec(made.grant.id, &open(&made, &["sh", "-c", "echo up; sleep 1000"])).await.unwrap();
    until_said(&mut live, "up").await;
    let ends = tenant.ends().await;
    for (expected, why) in [
        ((ExecEnd::Exited, Some(7)), "an exit code"),
        ((ExecEnd::Killed, None), "a signal"),
        ((ExecEnd::Refused, None), "a program that is not there"),
        ((ExecEnd::ClientDisconnect, None), "a person who left"),
        ((ExecEnd::Revoked, None), "one that was ended"),
        ((ExecEnd::Timeout, None), "one whose time was over"),
        ((ExecEnd::ConnectTimeout, None), "one that was never used"),
        ((ExecEnd::Lost, None), "one whose agent went"),
    ] {
        assert!(ends.contains(&expected), "{why}: {expected:?} is not in {ends:?}");
    }
    let operator = tenant.cluster.client().unwrap();
    operator.revoke_token(tenant.token).await.unwrap();
    let (_, end, reason) = to_end(&mut live).await;
    assert_eq!((end, reason.as_str()), (ExecEnd::Revoked, "Your token was revoked, or has ended."));
    assert_eq!(tenant.run(&["exec", "web", "--", "id"]).status.code(), Some(3));
}

/// Grants that nobody used go by themselves.
async fn wait_for_no_grants(tenant: &Tenant) {
    let gone = || {
        let listed = tenant.run(&["--json", "exec", "--list"]);
        let listed: Value = serde_json::from_slice(&listed.stdout).ok()?;
        listed.as_array()?.is_empty().then_some(())
    };
    wait_for("unused grants to be over", COME_MAX, gone).unwrap();
}

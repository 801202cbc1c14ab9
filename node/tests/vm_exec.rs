//! Programs beside the workload of a real guest, over the channel alone.
//!
//! Needs what `cargo xtask assets` makes and installs. Deadlines are guards against hanging, not measurements.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;

use std::time::Duration;

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_guest::exec::{ExecSignal, WINDOW_BYTES};
use holdfast_node::vmm::channel::{ExitStatus, GuestChannel, GuestConfig, GuestEvent, GuestSender, Workload};
use holdfast_node::vmm::exec::{ExecStream, Program, ProgramNews, Terminal, TerminalSize};
use holdfast_node::vmm::{Adoption, Vm, VmSpec};

/// Nothing here waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(120);

struct Guest {
    folder: tempfile::TempDir,
    vm: Vm,
    /// Taken to hang up: a machine's channel has room for one agent.
    sender: Option<GuestSender>,
    listening: tokio::task::JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.listening.abort();
        if let Ok(Adoption::Running(vm)) = Vm::adopt(&self.folder.path().join("inst_test")) {
            let pid = rustix::process::Pid::from_raw(vm.pid().cast_signed());
            rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL).ok();
        }
    }
}

impl Guest {
    fn sender(&self) -> &GuestSender {
        self.sender.as_ref().unwrap()
    }
}

fn config(user: &str) -> GuestConfig {
    GuestConfig {
        instance_id: "inst_test".to_owned(),
        hostname: "guest-7".to_owned(),
        now_unix_ms: 1_900_000_000_000,
        network: None,
        root_disk: true,
        workload: Workload {
            argv: ["sh", "-c", "exec sleep 1000"].map(str::to_owned).to_vec(),
            env: vec![("PATH".to_owned(), "/bin".to_owned()), ("GREETING".to_owned(), "hello".to_owned())],
            workdir: "/srv".to_owned(),
            user: user.to_owned(),
        },
        secrets: None,
        volumes: Vec::new(),
    }
}

/// Hears the guest in the background, so that its programs are heard.
fn listen(channel: GuestChannel) -> (GuestSender, tokio::task::JoinHandle<()>) {
    let GuestChannel { sender, mut receiver, .. } = channel;
    (sender, tokio::spawn(async move { while receiver.recv().await.is_ok() {} }))
}

async fn guest(user: &str) -> Guest {
    let folder = tempfile::Builder::new().prefix("hf-vm-").tempdir().unwrap();
    let image = root_image(folder.path(), FileSystem::Erofs);
    let vmm = guest_image::vmm(jails(folder.path()));
    let assets = assets();
    let spec = VmSpec {
        instance_id: "inst_test".to_owned(),
        folder: folder.path().join("inst_test"),
        kernel: assets.kernel,
        initrd: assets.initrd,
        root_image: Some(image),
        memory_mib: 128,
        vcpus: 1,
        cpu_milli: 1_000,
        nic: None,
        volumes: Vec::new(),
    };
    let vm = vmm.start(&spec).await.unwrap();
    let mut channel = GuestChannel::connect(&vm.channel(), 0, PATIENCE).await.unwrap();
    channel.sender.configure(&config(user)).await.unwrap();
    while !matches!(channel.receiver.recv().await.unwrap(), GuestEvent::Ready { .. }) {}
    let (sender, listening) = listen(channel);
    Guest { folder, vm, sender: Some(sender), listening }
}

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|word| (*word).to_owned()).collect()
}

fn terminal(rows: u16, columns: u16) -> Option<Terminal> {
    Some(Terminal { kind: "vt100".to_owned(), size: TerminalSize { rows, columns } })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    out: Vec<u8>,
    err: Vec<u8>,
}

impl Said {
    fn out(&self) -> &str {
        std::str::from_utf8(&self.out).unwrap()
    }
}

async fn news(program: &mut Program) -> ProgramNews {
    tokio::time::timeout(PATIENCE, program.news()).await.expect("the program fell silent").unwrap()
}

/// Hears a program to its end.
async fn to_end(program: &mut Program) -> (Said, ProgramNews) {
    let mut said = Said::default();
    loop {
        match news(program).await {
            ProgramNews::Started => {}
            ProgramNews::Output(ExecStream::Stdout, bytes) => said.out.extend(bytes),
            ProgramNews::Output(ExecStream::Stderr, bytes) => said.err.extend(bytes),
            end => return (said, end),
        }
    }
}

/// Hears until the output holds a text.
async fn until(program: &mut Program, text: &str) -> String {
    let mut heard = String::new();
    while !heard.contains(text) {
        match news(program).await {
            ProgramNews::Output(_, bytes) => heard.push_str(&String::from_utf8_lossy(&bytes)),
            ProgramNews::Started => {}
            end => panic!("{end:?} after {heard:?}"),
        }
    }
    heard
}

async fn run(sender: &GuestSender, script: &str) -> (Said, ProgramNews) {
    let mut program = sender.run(words(&["sh", "-c", script]), None).await.unwrap();
    to_end(&mut program).await
}

#[tokio::test]
async fn a_program_runs_as_the_workloads_user_and_its_exit_code_comes_back() {
    let guest = guest("web").await;
    let (said, end) = run(guest.sender(), "id -u; pwd; echo $GREETING; echo oops >&2; exit 7").await;
    assert_eq!((said.out(), said.err.as_slice()), ("33\n/srv\nhello\n", &b"oops\n"[..]));
    assert_eq!(end, ProgramNews::Ended(ExitStatus::Code(7)));
    let (_, end) = run(guest.sender(), "kill -9 $$").await;
    assert_eq!(end, ProgramNews::Ended(ExitStatus::Signal(9)));
    // Everything that was in the pipe at the end comes, and somebody who holds it open does not delay it for ever.
    let (said, end) = run(guest.sender(), "seq 1 9000; sleep 1000 & exit 3").await;
    assert_eq!(said.out().lines().count(), 9_000);
    assert_eq!(end, ProgramNews::Ended(ExitStatus::Code(3)));
    let mut absent = guest.sender().run(words(&["/bin/nothing"]), None).await.unwrap();
    let ProgramNews::Refused { reason } = news(&mut absent).await else { panic!("it started") };
    assert!(reason.contains("'/bin/nothing' could not be started"), "{reason}");
    assert!(guest.vm.is_alive());
}

#[tokio::test]
async fn a_mebibyte_goes_through_pipes_in_both_directions_and_the_end_of_input_arrives() {
    let guest = guest("").await;
    let mut program = guest.sender().run(words(&["cat"]), None).await.unwrap();
    let writer = program.writer();
    let sent: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        writer.input(&sent).await.unwrap();
        writer.end_input().await.unwrap();
    });
    let (said, end) = to_end(&mut program).await;
    writing.await.unwrap();
    assert_eq!(end, ProgramNews::Ended(ExitStatus::Code(0)));
    assert!(said.out == expected, "{} bytes came back", said.out.len());
}

#[tokio::test]
async fn a_terminal_has_a_size_a_name_signals_and_an_end() {
    let guest = guest("web").await;
    let mut shell = guest.sender().run(Vec::new(), terminal(31, 99)).await.unwrap();
    let writer = shell.writer();
    // Its own answers are told from the terminal's echo of what was typed by the quotes.
    writer.input(b"stty size; echo 'is '$TERM; tty -s && echo 'a 't'ty'\n").await.unwrap();
    let said = until(&mut shell, "a tty").await;
    assert!(said.contains("31 99") && said.contains("is vt100"), "{said}");
    writer.resize(TerminalSize { rows: 40, columns: 120 }).await.unwrap();
    writer.input(b"stty size\n").await.unwrap();
    until(&mut shell, "40 120").await;
    // ^C reaches what is in the foreground, and the shell stays.
    writer.input(b"sleep 2001; echo 'af'ter\n").await.unwrap();
    until_there(guest.sender(), "sleep 2001").await;
    writer.input(b"\x03").await.unwrap();
    writer.input(b"echo 'st'ill here\n").await.unwrap();
    until(&mut shell, "still here").await;
    // So does a signal from outside.
    writer.input(b"sleep 2002\n").await.unwrap();
    until_there(guest.sender(), "sleep 2002").await;
    writer.signal(ExecSignal::Int).await.unwrap();
    writer.input(b"echo 'ag'ain\n").await.unwrap();
    until(&mut shell, "again").await;
    // The end of input is there for everybody who reads: for what the shell runs, and then for the shell, which ends
    // with the code of its last command.
    writer.input(b"cat\n").await.unwrap();
    until_there(guest.sender(), "cat").await;
    writer.end_input().await.unwrap();
    let (_, end) = to_end(&mut shell).await;
    assert_eq!(end, ProgramNews::Ended(ExitStatus::Code(0)));
}

#[tokio::test]
async fn a_program_that_nobody_hears_holds_up_neither_another_nor_the_guest() {
    let guest = guest("").await;
    // Its output fills its window, and waits there.
    let mut flood = guest.sender().run(words(&["sh", "-c", "seq 1 1000000"]), None).await.unwrap();
    // Input that nobody reads fills its window, too.
    let deaf = guest.sender().run(words(&["sleep", "1000"]), None).await.unwrap();
    let writer = deaf.writer();
    let full = vec![b'x'; WINDOW_BYTES as usize + (64 << 10) + 4096];
    let stuck = tokio::spawn(async move { writer.input(&full).await });
    for n in 0..3 {
        let (said, end) = run(guest.sender(), &format!("echo {n}")).await;
        assert_eq!((said.out(), end), (format!("{n}\n").as_str(), ProgramNews::Ended(ExitStatus::Code(0))));
    }
    assert!(!stuck.is_finished());
    // And it is all there when somebody hears it.
    let (said, end) = to_end(&mut flood).await;
    assert_eq!((said.out().lines().count(), end), (1_000_000, ProgramNews::Ended(ExitStatus::Code(0))));
    deaf.hang_up(true).await.unwrap();
    stuck.abort();
}

/// How many processes run this command in the guest.
async fn count(sender: &GuestSender, command: &str) -> usize {
    let script = format!(
        "n=0; for p in /proc/[0-9]*; do case $(tr '\\0' ' ' < $p/cmdline) in '{command} ') n=$((n+1));; esac; done 2>/dev/null; echo $n"
    );
    let (said, _) = run(sender, &script).await;
    said.out().trim().parse().unwrap()
}

/// Waits until a command runs: it has its own name only once it has been started, in the foreground if it is to be
/// there.
async fn until_there(sender: &GuestSender, command: &str) {
    let there = async {
        while count(sender, command).await == 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, there).await.expect("the command does not start");
}

async fn until_gone(sender: &GuestSender, command: &str) {
    let gone = async {
        while count(sender, command).await > 0 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("what was hung up runs on");
}

#[tokio::test]
async fn i11_what_is_hung_up_ends_even_if_it_ignores_hup_and_term_and_with_an_agent_go_its_programs() {
    let mut guest = guest("").await;
    let script = "trap '' HUP TERM; sleep 4001 & echo up; while :; do sleep 1; done";
    let stubborn = |script: &str| words(&["sh", "-c", script]);
    let mut killed = guest.sender().run(stubborn(script), None).await.unwrap();
    until(&mut killed, "up").await;
    until_there(guest.sender(), "sleep 4001").await;
    killed.hang_up(true).await.unwrap();
    until_gone(guest.sender(), "sleep 4001").await;
    // Without force it is HUP and TERM first, and KILL only after half a minute.
    let mut hung_up =
        guest.sender().run(stubborn(&script.replace("4001", "4002")), terminal(24, 80)).await.unwrap();
    until(&mut hung_up, "up").await;
    until_there(guest.sender(), "sleep 4002").await;
    hung_up.hang_up(false).await.unwrap();
    assert_eq!(count(guest.sender(), "sleep 4002").await, 1, "it ignores HUP");
    until_gone(guest.sender(), "sleep 4002").await;

    // An agent that goes takes its programs along; the workload stays.
    let mut left = guest.sender().run(stubborn("sleep 4003 & echo up; wait"), None).await.unwrap();
    until(&mut left, "up").await;
    until_there(guest.sender(), "sleep 4003").await;
    guest.listening.abort();
    drop((left, guest.sender.take()));
    let next = GuestChannel::connect(&guest.vm.channel(), 0, PATIENCE).await.unwrap();
    let (sender, listening) = listen(next);
    until_gone(&sender, "sleep 4003").await;
    assert_eq!(count(&sender, "sleep 1000").await, 1, "the workload was not touched");
    listening.abort();
}

//! The conformance suite of the VMMs: boots real guests and speaks with their init. On QEMU without KVM, which works on
//! every host; `HOLDFAST_SUITE_VMM=firecracker` or `qemu-kvm` runs it, and the other `vm_*` tests, on another.
//!
//! Needs what `cargo xtask assets` makes and installs. Deadlines are guards against hanging, not measurements.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod guest_image;

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use guest_image::{FileSystem, assets, jails, root_image};
use holdfast_node::vmm::{
    Adoption, Vm, VmEnd, VmSpec, Vmm, VmmError, VmmKind,
    channel::{
        ChannelError, ExitStatus, GuestChannel, GuestConfig, GuestEvent, GuestReceiver, GuestState,
        HealthCheck, LogStream, Secrets, Workload,
    },
    probe::{self, Outcome, ProbeConfig},
};

/// Nothing here waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

fn vmm(folder: &Folder) -> Box<dyn Vmm> {
    guest_image::vmm(jails(folder.path()))
}

/// A folder that takes the machine in it along when a test ends, however it ends.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("hf-vm-").tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Ok(Adoption::Running(vm)) = Vm::adopt(&self.path().join("inst_test")) {
            let pid = rustix::process::Pid::from_raw(vm.pid().cast_signed());
            rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL).ok();
        }
    }
}

struct Guest {
    folder: Folder,
    vm: Vm,
    channel: GuestChannel,
}

fn spec(folder: &Folder, root_image: Option<PathBuf>) -> VmSpec {
    let assets = assets();
    VmSpec {
        instance_id: "inst_test".to_owned(),
        folder: folder.path().join("inst_test"),
        kernel: assets.kernel,
        initrd: assets.initrd,
        root_image,
        memory_mib: 128,
        vcpus: 1,
        cpu_milli: 1_000,
        nic: None,
        volumes: Vec::new(),
    }
}

async fn boot(file_system: FileSystem) -> Guest {
    let folder = Folder::new();
    let image = root_image(folder.path(), file_system);
    let vm = vmm(&folder).start(&spec(&folder, Some(image))).await.unwrap();
    let channel = match GuestChannel::connect(&vm.channel(), 0, PATIENCE).await {
        Ok(channel) => channel,
        Err(error) => panic!("{error}; console: {}", vm.console_said()),
    };
    assert_eq!(channel.hello.state, GuestState::AwaitingConfig);
    Guest { folder, vm, channel }
}

fn config(script: &str) -> GuestConfig {
    GuestConfig {
        instance_id: "inst_test".to_owned(),
        hostname: "guest-7".to_owned(),
        now_unix_ms: 1_900_000_000_000,
        network: None,
        root_disk: true,
        workload: Workload {
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![
                ("PATH".to_owned(), "/bin".to_owned()),
                ("GREETING".to_owned(), "good morning".to_owned()),
            ],
            workdir: "/srv/made".to_owned(),
            user: String::new(),
        },
        secrets: None,
        volumes: Vec::new(),
    }
}

async fn next(receiver: &mut GuestReceiver) -> GuestEvent {
    tokio::time::timeout(PATIENCE, receiver.recv()).await.expect("the guest fell silent").unwrap()
}

async fn start_workload(channel: &mut GuestChannel, config: &GuestConfig) {
    channel.sender.configure(config).await.unwrap();
    assert_eq!(next(&mut channel.receiver).await, GuestEvent::ConfigApplied);
    let event = next(&mut channel.receiver).await;
    assert!(matches!(event, GuestEvent::Ready { .. }), "{event:?}");
}

/// Reads the log up to the exit: lines in order, and the status.
async fn run_to_end(receiver: &mut GuestReceiver) -> (Vec<(u64, LogStream, String)>, ExitStatus) {
    let mut lines = Vec::new();
    loop {
        match next(receiver).await {
            GuestEvent::Log(line) => {
                lines.push((line.seq, line.stream, String::from_utf8(line.bytes).unwrap()));
            }
            GuestEvent::Exited(status) => return (lines, status),
            other => panic!("{other:?}"),
        }
    }
}

async fn ends(vm: &Vm) -> VmEnd {
    tokio::time::timeout(PATIENCE, vm.ended()).await.expect("the guest did not leave").unwrap()
}

fn texts(lines: &[(u64, LogStream, String)]) -> Vec<&str> {
    lines.iter().map(|(_, _, text)| text.as_str()).collect()
}

#[tokio::test]
async fn a_guest_runs_its_workload_and_reports_how_it_ended() {
    for file_system in [FileSystem::Ext4, FileSystem::Erofs] {
        let mut guest = boot(file_system).await;
        let script = "pwd; echo $GREETING; hostname; date -u +%Y; cat /run/secrets/platform.env; \
                      stat -c '%a %u' /run/secrets/keys/TOKEN; touch /written && echo wrote; \
                      touch /proc/1/x 2>/dev/null || echo proc; id -u; echo complaint >&2; exit 7";
        let mut config = config(script);
        config.secrets = Some(Secrets {
            platform_env: b"# HOLDFAST_SECRETS_V1\nTOKEN=abc\n".to_vec(),
            keys: vec![("TOKEN".to_owned(), b"abc".to_vec())],
        });
        start_workload(&mut guest.channel, &config).await;
        let (lines, status) = run_to_end(&mut guest.channel.receiver).await;
        assert_eq!(status, ExitStatus::Code(7));
        let out: Vec<&str> =
            lines.iter().filter(|(_, s, _)| *s == LogStream::Stdout).map(|(_, _, t)| t.as_str()).collect();
        assert_eq!(
            out,
            [
                "/srv/made",
                "good morning",
                "guest-7",
                "2030",
                "# HOLDFAST_SECRETS_V1",
                "TOKEN=abc",
                "400 0",
                "wrote",
                "proc",
                "0"
            ]
        );
        let err: Vec<_> = lines.iter().filter(|(_, s, _)| *s == LogStream::Stderr).collect();
        assert_eq!(err.len(), 1);
        assert_eq!(err[0].2, "complaint");
        let seqs: Vec<u64> = lines.iter().map(|(seq, _, _)| *seq).collect();
        assert_eq!(seqs, (1..=11).collect::<Vec<u64>>());

        assert!(guest.vm.is_alive(), "a guest waits to be dismissed");
        guest.channel.sender.dismiss().await.unwrap();
        let end = ends(&guest.vm).await;
        assert!(matches!(end, VmEnd::Exited { .. }), "{end:?}");
        assert!(!guest.vm.is_alive());
    }
}

#[tokio::test]
async fn a_workload_runs_as_its_user_and_can_read_its_secrets() {
    let mut guest = boot(FileSystem::Ext4).await;
    let mut config = config(
        "id -u; id -g; cat /run/secrets/keys/TOKEN; echo; touch /x 2>/dev/null || echo refused; \
             ulimit -n; ulimit -H -n; ulimit -H -c; \
             while read device at kind rest; do [ $at = /run ] && echo $kind; done </proc/mounts; true",
    );
    config.workload.user = "web:staff".to_owned();
    config.secrets =
        Some(Secrets { platform_env: Vec::new(), keys: vec![("TOKEN".to_owned(), b"abc".to_vec())] });
    start_workload(&mut guest.channel, &config).await;
    let (lines, status) = run_to_end(&mut guest.channel.receiver).await;
    assert_eq!(texts(&lines), ["33", "50", "abc", "refused", "65536", "524288", "0", "tmpfs"]);
    assert_eq!(status, ExitStatus::Code(0));
    guest.vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_workload_is_checked_and_stopped() {
    let mut guest = boot(FileSystem::Erofs).await;
    let script = "trap 'echo stopping; exit 3' TERM; mkdir -p /tmp/www; echo up >/tmp/www/up; \
                  httpd -p [::]:8080 -h /tmp/www; echo serving; while :; do sleep 0.1; done";
    start_workload(&mut guest.channel, &config(script)).await;
    let GuestChannel { sender, mut receiver, .. } = guest.channel;
    let GuestEvent::Log(line) = next(&mut receiver).await else { panic!("a line was expected") };
    assert_eq!(line.bytes, b"serving");
    // Answers arrive only while somebody listens.
    let listening = tokio::spawn(async move { run_to_end(&mut receiver).await });

    let command =
        |script: &str| HealthCheck::Command { argv: ["sh", "-c", script].map(str::to_owned).to_vec() };
    let healthy = [
        HealthCheck::Tcp { port: 8080 },
        HealthCheck::Http { port: 8080, path: "/up".to_owned() },
        command("test $GREETING = 'good morning' || test -n \"$GREETING\""),
    ];
    for check in healthy {
        // httpd puts itself into the background: until it listens, the check may fail.
        let mut verdict = sender.health(check.clone(), Duration::from_secs(10)).await.unwrap();
        for _ in 0..100 {
            if verdict.healthy {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            verdict = sender.health(check.clone(), Duration::from_secs(10)).await.unwrap();
        }
        assert!(verdict.healthy, "{check:?}: {verdict:?}");
    }
    let unhealthy = [
        (HealthCheck::Tcp { port: 8081 }, "did not accept a connection"),
        (HealthCheck::Http { port: 8080, path: "/absent".to_owned() }, "status 404"),
        (command("exit 4"), "exit code 4"),
        (command("sleep 1000"), "did not end in time"),
        (HealthCheck::Command { argv: vec!["/absent".to_owned()] }, "could not be started"),
    ];
    for (check, why) in unhealthy {
        let verdict = sender.health(check.clone(), Duration::from_secs(2)).await.unwrap();
        assert!(!verdict.healthy && verdict.detail.contains(why), "{check:?}: {verdict:?}");
    }

    sender.stop(Duration::from_secs(60)).await.unwrap();
    let (lines, status) = listening.await.unwrap();
    assert_eq!(texts(&lines), ["stopping"]);
    assert_eq!(status, ExitStatus::Code(3));
    sender.dismiss().await.unwrap();
    assert!(matches!(ends(&guest.vm).await, VmEnd::Exited { .. }));
}

#[tokio::test]
async fn a_workload_that_ignores_term_is_killed_after_its_grace() {
    let mut guest = boot(FileSystem::Ext4).await;
    start_workload(&mut guest.channel, &config("trap '' TERM; echo deaf; while :; do sleep 0.1; done")).await;
    next(&mut guest.channel.receiver).await;
    guest.channel.sender.stop(Duration::from_millis(200)).await.unwrap();
    let (lines, status) = run_to_end(&mut guest.channel.receiver).await;
    assert_eq!(status, ExitStatus::Signal(9));
    let [(_, LogStream::Init, notice)] = &lines[..] else { panic!("{lines:?}") };
    assert!(notice.contains("did not stop within its grace"), "{notice}");
    guest.vm.kill().await.unwrap();
}

#[tokio::test]
async fn i05_a_restarted_agent_adopts_the_machine_and_misses_no_line() {
    let mut guest = boot(FileSystem::Ext4).await;
    let script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; done; \
                  while [ ! -e /tmp/go ]; do sleep 0.1; done; echo line 301; exit 0";
    start_workload(&mut guest.channel, &config(script)).await;
    let mut seen = Vec::new();
    while seen.len() < 120 {
        let GuestEvent::Log(line) = next(&mut guest.channel.receiver).await else {
            panic!("a line was expected")
        };
        seen.push(line.seq);
    }
    let (pid, kind) = (guest.vm.pid(), guest.vm.kind());
    let folder = guest.vm.folder().to_owned();
    // The agent dies with frames unread; a second one knows the folder and what it had stored, nothing else.
    drop(guest.channel);
    drop(guest.vm);
    let Adoption::Running(vm) = Vm::adopt(&folder).unwrap() else { panic!("the machine must still run") };
    assert_eq!((vm.pid(), vm.kind(), vm.instance_id()), (pid, kind, "inst_test"));
    let mut channel = GuestChannel::connect(&vm.channel(), 120, PATIENCE).await.unwrap();
    assert_eq!(channel.hello.state, GuestState::Running);
    while seen.len() < 300 {
        let GuestEvent::Log(line) = next(&mut channel.receiver).await else { panic!("a line was expected") };
        assert_eq!(String::from_utf8(line.bytes).unwrap(), format!("line {}", line.seq));
        seen.push(line.seq);
    }
    assert_eq!(seen, (1..=300).collect::<Vec<u64>>());

    // A third agent finds the exit that the second did not live to see.
    let GuestChannel { sender, mut receiver, .. } = channel;
    let check = HealthCheck::Command { argv: ["touch", "/tmp/go"].map(str::to_owned).to_vec() };
    let hear = tokio::spawn(async move { receiver.recv().await });
    sender.health(check, Duration::from_secs(30)).await.unwrap();
    hear.abort();
    drop(sender);
    // Aborted or done, the second agent's connection is closed once its task is gone.
    hear.await.ok();
    let mut channel = GuestChannel::connect(&vm.channel(), 300, PATIENCE).await.unwrap();
    let (lines, status) = run_to_end(&mut channel.receiver).await;
    assert_eq!(texts(&lines), ["line 301"]);
    assert_eq!(status, ExitStatus::Code(0));
    channel.sender.dismiss().await.unwrap();
    ends(&vm).await;
    assert!(matches!(Vm::adopt(&folder).unwrap(), Adoption::Gone));
    drop(guest.folder);
}

#[tokio::test]
async fn a_second_machine_is_not_started_from_the_same_folder() {
    let folder = Folder::new();
    let spec = spec(&folder, None);
    let vm = vmm(&folder).start(&spec).await.unwrap();
    let refused = vmm(&folder).start(&spec).await.unwrap_err();
    assert!(matches!(refused, VmmError::AlreadyRunning { pid, .. } if pid == vm.pid()), "{refused}");
    // Also when the first agent died before it wrote the record.
    std::fs::remove_file(spec.folder.join("vm.json")).unwrap();
    let refused = vmm(&folder).start(&spec).await.unwrap_err();
    assert!(matches!(refused, VmmError::AlreadyRunning { pid, .. } if pid == vm.pid()), "{refused}");
    vm.kill().await.unwrap();
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_crash_of_the_machine_is_noticed() {
    let mut guest = boot(FileSystem::Ext4).await;
    start_workload(&mut guest.channel, &config("echo running; sleep 1000")).await;
    next(&mut guest.channel.receiver).await;
    let pid = rustix::process::Pid::from_raw(guest.vm.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert!(matches!(ends(&guest.vm).await, VmEnd::Exited { .. }));
    let broken = tokio::time::timeout(PATIENCE, guest.channel.receiver.recv()).await.unwrap();
    assert!(matches!(broken, Err(ChannelError::Broken { .. })), "{broken:?}");
}

#[tokio::test]
async fn i14_a_configuration_that_cannot_be_met_is_answered_with_a_sentence() {
    let mut guest = boot(FileSystem::Ext4).await;
    let mut impossible = config("true");
    impossible.workload.user = "nobody-here".to_owned();
    guest.channel.sender.configure(&impossible).await.unwrap();
    let event = next(&mut guest.channel.receiver).await;
    let GuestEvent::Failed { reason } = event else { panic!("{event:?}") };
    assert!(reason.contains("no user or group named 'nobody-here'"), "{reason}");
    guest.channel.sender.dismiss().await.unwrap();
    ends(&guest.vm).await;
}

#[tokio::test]
async fn a_guest_that_does_not_boot_is_reported() {
    let folder = Folder::new();
    let mut spec = spec(&folder, None);
    // A kernel without an init panics and resets, and the VMM ends.
    spec.initrd = folder.path().join("empty.cpio");
    std::fs::write(&spec.initrd, b"").unwrap();
    let vm = vmm(&folder).start(&spec).await.unwrap();
    assert!(matches!(ends(&vm).await, VmEnd::Exited { .. }));
    assert!(vm.console_said().contains("Kernel panic"), "{}", vm.console_said());

    // One that is no kernel at all is refused by the VMM, with its words.
    spec.kernel = spec.initrd.clone();
    let error = vmm(&folder).start(&spec).await.unwrap_err();
    match &error {
        VmmError::EndedAtOnce { said, .. } => assert_ne!(said, "nothing", "{error}"),
        VmmError::Refused { answer, .. } => assert!(answer.starts_with("400 "), "{error}"),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_hanging_guest_is_noticed_by_its_missing_hello() {
    let mut guest = boot(FileSystem::Ext4).await;
    start_workload(&mut guest.channel, &config("echo up; sleep 1000")).await;
    drop(guest.channel);
    let pid = rustix::process::Pid::from_raw(guest.vm.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let silent = GuestChannel::connect(&guest.vm.channel(), 0, Duration::from_secs(3)).await;
    assert!(matches!(silent, Err(ChannelError::NoHello { .. })), "{silent:?}");
    // A stopped process is still killed for good.
    guest.vm.kill().await.unwrap();
    assert!(!guest.vm.is_alive());
}

#[tokio::test]
async fn a_guest_that_its_vmm_stopped_is_noticed() {
    let folder = Folder::new();
    let vmm = vmm(&folder);
    if vmm.kind() == VmmKind::Firecracker {
        // It has no such state: on an internal error of KVM its process ends.
        return;
    }
    let vm = vmm.start(&spec(&folder, None)).await.unwrap();
    // What QEMU does by itself on an internal error of KVM: the process lives, the guest does not.
    let mut control = UnixStream::connect(vm.folder().join("qmp.sock")).unwrap();
    control.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"stop\"}\n").unwrap();
    let mut answers = BufReader::new(&control).lines();
    assert!(answers.any(|line| line.unwrap().contains("STOP")));
    drop(control);
    let end = ends(&vm).await;
    assert!(matches!(&end, VmEnd::GuestStopped { status } if status == "paused"), "{end:?}");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn i05_output_without_an_agent_is_bounded_and_its_loss_is_counted() {
    let mut guest = boot(FileSystem::Erofs).await;
    // More than the guest's buffer and every pipe on the way hold.
    let script = "while [ ! -e /tmp/go ]; do sleep 0.05; done; seq 1 60000; echo last; exec sleep 1000";
    start_workload(&mut guest.channel, &config(script)).await;
    let go = HealthCheck::Command { argv: ["touch", "/tmp/go"].map(str::to_owned).to_vec() };
    let GuestChannel { sender, mut receiver, .. } = guest.channel;
    // The agent hears nothing but the answer, and is gone.
    let hear = tokio::spawn(async move { receiver.recv().await });
    sender.health(go, Duration::from_secs(30)).await.unwrap();
    hear.abort();
    hear.await.ok();
    drop(sender);

    // How far the workload came, another agent learns without taking a line.
    let first_seq = loop {
        let hello = GuestChannel::connect(&guest.vm.channel(), u64::MAX, PATIENCE).await.unwrap().hello;
        if hello.log_first_seq > 50_001 {
            break hello.log_first_seq;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let mut channel = GuestChannel::connect(&guest.vm.channel(), 5, PATIENCE).await.unwrap();
    assert_eq!(channel.hello.log_first_seq, first_seq);
    let mut expected = first_seq;
    loop {
        let GuestEvent::Log(line) = next(&mut channel.receiver).await else { panic!("a line was expected") };
        assert_eq!(line.seq, expected, "what is left comes in order");
        expected += 1;
        if line.bytes == b"last" {
            break;
        }
        assert_eq!(String::from_utf8(line.bytes).unwrap(), line.seq.to_string());
    }
    assert_eq!((first_seq, expected), (50_002, 60_002), "exactly the newest 10,000 lines are left");
    guest.vm.kill().await.unwrap();
}

#[tokio::test]
async fn i14_a_guest_cannot_fill_the_hosts_disk_through_its_console() {
    let mut guest = boot(FileSystem::Ext4).await;
    let script = "head -c 1300000 /dev/zero | tr '\\0' x >/dev/console; echo survived; exit 0";
    start_workload(&mut guest.channel, &config(script)).await;
    let (lines, status) = run_to_end(&mut guest.channel.receiver).await;
    assert_eq!((texts(&lines), status), (vec!["survived"], ExitStatus::Code(0)));
    let written = std::fs::metadata(guest.vm.console_path()).unwrap().len();
    assert_eq!(written, 1024 * 1024);
    guest.channel.sender.dismiss().await.unwrap();
    ends(&guest.vm).await;
}

#[tokio::test]
async fn the_probe_finds_a_vmm_that_boots_and_remembers_it() {
    let folder = Folder::new();
    let assets = assets();
    let config = ProbeConfig {
        kernel: assets.kernel,
        initrd: assets.initrd,
        folder: folder.path().to_owned(),
        firecracker: None,
        qemu: probe::find_qemu(),
        jails: jails(folder.path()),
    };
    let (vmm, verdict) = probe::choose(&config).await.unwrap();
    assert_eq!(Some(vmm.kind()), verdict.chosen);
    assert!(
        verdict.findings.iter().any(|finding| matches!(finding.outcome, Outcome::Boots { .. })),
        "{verdict}"
    );
    assert_eq!(verdict.findings.len(), 3, "{verdict}");
    assert!(!folder.path().join("probe").exists(), "a probe leaves no machine behind");
    println!("{verdict}");
    // The second answer is the first one, which holds the time that its guest took.
    let (_, again) = probe::choose(&config).await.unwrap();
    assert_eq!(again, verdict);
    assert_eq!(probe::last_verdict(folder.path()), Some(verdict));
}

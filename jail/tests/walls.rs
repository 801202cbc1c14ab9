//! Each wall, tried from the inside. The same attempts are made three times: with no wall, where they succeed (so they are
//! real); with one wall alone, where those that it is for fail (so it stands by itself); and with all of them.
//!
//! Needs root. Each test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../../node/tests/namespace/mod.rs"]
mod namespace;
mod scene;

use std::collections::BTreeMap;
use std::fs;

use holdfast_jail::plan::{Access, Attack, Filter, Identity, Limits, Namespace, Plan, Profile};
use scene::{FILE_BYTES_MAX, Scene, THREADS_MAX};

/// What a wall is for: its name, how it is put up alone, and what must fail then.
type Wall = (&'static str, fn(&Scene, &mut Plan), &'static [&'static str]);

/// Makes a plan one that cannot be carried out.
type Break<'a> = &'a dyn Fn(&mut Plan);

const CALLS: &[&str] = &[
    "call_ptrace",
    "call_mount",
    "call_umount",
    "call_open_tree",
    "call_fsopen",
    "call_move_mount",
    "call_pivot_root",
    "call_chroot",
    "call_unshare",
    "call_setns",
    "call_bpf",
    "call_keyctl",
    "call_add_key",
    "call_init_module",
    "call_finit_module",
    "call_kexec_load",
    "call_perf_event_open",
    "call_userfaultfd",
    "call_process_vm_readv",
    "call_open_by_handle_at",
    "call_syslog",
    "call_iopl",
    "call_settimeofday",
    "call_sethostname",
    "call_execve",
    "call_loop_clr_fd",
    "call_loop_configure",
];

/// Refused, but nothing to kill a process for: libraries ask for them.
const PROBES: &[&str] = &[
    "call_io_uring_setup",
    "call_memfd_create",
    "call_raise_limit_of_all",
    "call_namespace_by_clone",
    "socket_inet",
    "socket_inet6",
    "socket_netlink",
    "socket_packet",
    "socket_vsock",
    "become_another",
    "run_shell",
    "run_from_memory",
    "shared_memory",
    "control_plane",
    "abstract_socket",
    "neighbour_socket",
];

const WALLS: &[Wall] = &[
    (
        "root",
        |scene, plan| {
            plan.namespaces = vec![Namespace::Mount];
            plan.root = Some(scene.root());
        },
        &[
            "read_absolute",
            "read_dotdot",
            "read_through_proc",
            "read_through_symlink",
            "read_private",
            "list_root",
            "write_host",
            "write_root",
            "write_own_library",
            "neighbour_socket",
            "disk_device",
            "make_device",
            "read_other",
            "run_shell",
            "fill_folder",
        ],
    ),
    ("process namespace", |_, plan| plan.namespaces = vec![Namespace::Pid], &["signal_other"]),
    (
        "network namespace",
        |_, plan| plan.namespaces = vec![Namespace::Network],
        &["control_plane", "metadata", "abstract_socket"],
    ),
    ("ipc namespace", |_, plan| plan.namespaces = vec![Namespace::Ipc], &["shared_memory"]),
    ("uts namespace", |_, plan| plan.namespaces = vec![Namespace::Uts], &["host_name"]),
    (
        "user",
        |scene, plan| plan.identity = Some(scene.identity()),
        &["read_private", "become_root", "become_another", "take_capability", "disk_device", "signal_other"],
    ),
    (
        "capabilities",
        |_, plan| plan.no_capabilities = true,
        // Still user 0, and so still the owner of root's files, which is why there is a user of its own as well.
        &["become_another", "take_capability", "bounding_set", "make_device"],
    ),
    (
        "landlock",
        |scene, plan| plan.access = Some(scene.access()),
        &[
            "read_absolute",
            "read_dotdot",
            "read_through_proc",
            "read_through_symlink",
            "read_private",
            "list_root",
            "write_host",
            "write_own_library",
            "fill_folder",
            "disk_device",
            "make_device",
            "read_other",
            "run_shell",
            "control_plane",
            "metadata",
            "abstract_socket",
            "signal_other",
        ],
    ),
    (
        "seccomp",
        |_, plan| plan.filter = Some(Filter { profile: Profile::Qemu, attack: Attack::Refuse }),
        CALLS,
    ),
    (
        "seccomp",
        |_, plan| plan.filter = Some(Filter { profile: Profile::Qemu, attack: Attack::Refuse }),
        PROBES,
    ),
    (
        "rlimits",
        |scene, plan| {
            plan.limits = scene.limits();
            // Who may raise them is another wall's affair; the number of threads is one for users only.
            plan.identity = Some(scene.identity());
        },
        &["many_threads", "large_file", "much_memory", "many_descriptors", "raise_limits"],
    ),
];

#[test]
fn i09_each_wall_stands_alone_and_all_stand_together() {
    if !namespace::inside("i09_each_wall_stands_alone_and_all_stand_together") {
        return;
    }
    let scene = Scene::new();
    let mut attempts: Vec<&str> =
        WALLS.iter().flat_map(|(_, _, attempts)| attempts.iter().copied()).collect();
    attempts.sort_unstable();
    attempts.dedup();
    // One process for each, because one that succeeds may change what the next one can do.
    let open: BTreeMap<&str, _> =
        attempts.iter().map(|attempt| (*attempt, scene.run(&scene.bare(), &[attempt]))).collect();
    let harmless: Vec<_> = open.iter().filter(|(name, made)| !made.succeeded(name)).collect();
    assert!(harmless.is_empty(), "these attempts fail without any wall, so they prove nothing: {harmless:?}");

    let mut breached = Vec::new();
    for (wall, put_up, attempts) in WALLS {
        let mut plan = scene.bare();
        put_up(&scene, &mut plan);
        for attempt in *attempts {
            let made = scene.run(&plan, &[attempt]);
            if !made.failed(attempt) {
                breached.push(format!("{attempt} against the wall '{wall}' alone: {made:?}"));
            }
        }
    }
    assert!(breached.is_empty(), "{}", breached.join("\n"));

    // All of them, with an attacker who is not stopped by the first thing that he tries.
    let mut plan = scene.all();
    plan.filter = Some(Filter { profile: Profile::Qemu, attack: Attack::Refuse });
    let left =
        ["inherited_descriptor", "environment", "terminal_session", "core_dump", "gain_privileges_by_exec"];
    attempts.extend(left);
    // Last: its threads have the numbers by which the next attempt would know others.
    attempts.retain(|attempt| *attempt != "many_threads");
    attempts.push("many_threads");
    let made = scene.run(&plan, &attempts);
    let breached: Vec<_> = attempts.iter().filter(|attempt| !made.failed(attempt)).collect();
    assert!(breached.is_empty(), "with every wall up: {breached:?} of {made:?}");
    println!("{} attempts, {} refused", attempts.len(), made.failures());
    assert_eq!(made.failures(), attempts.len());
}

#[test]
fn i10_i14_a_vmm_leaves_no_core_and_writes_no_large_file() {
    if !namespace::inside("i10_i14_a_vmm_leaves_no_core_and_writes_no_large_file") {
        return;
    }
    // Also where there are no walls, because the agent is not root: nobody needs to be, to be limited.
    let scene = Scene::new();
    let plan = Plan { limits: scene.limits(), ..scene.bare() };
    let made = scene.run(&plan, &["core_dump", "large_file"]);
    assert!(made.failed("core_dump") && made.failed("large_file") && !made.ended_early(), "{made:?}");
    let written = fs::metadata(scene.folder().join("given")).unwrap().len();
    assert_eq!(written, FILE_BYTES_MAX, "all that may be written is written");
}

#[test]
fn i09_who_asks_for_what_only_an_attacker_asks_for_is_killed() {
    if !namespace::inside("i09_who_asks_for_what_only_an_attacker_asks_for_is_killed") {
        return;
    }
    let scene = Scene::new();
    for call in CALLS {
        let made = scene.run(&scene.all(), &[call, "environment"]);
        assert!(made.tried(call) && made.ended_early(), "{call}: {made:?}");
    }
    // What libraries probe for is refused, and the process lives.
    let made = scene.run(&scene.all(), PROBES);
    assert!(!made.ended_early() && PROBES.iter().all(|probe| made.failed(probe)), "{made:?}");
}

#[test]
fn i14_a_vmm_that_makes_its_own_sockets_makes_nothing_else() {
    if !namespace::inside("i14_a_vmm_that_makes_its_own_sockets_makes_nothing_else") {
        return;
    }
    let scene = Scene::new();
    let plan = scene.all_for_firecracker();
    let allowed = ["make_socket", "random_device"];
    let refused = [
        "write_host",
        "fill_folder",
        "read_through_symlink",
        "read_private",
        "disk_device",
        "write_own_library",
        "control_plane",
        "signal_other",
        "run_from_memory",
        "become_root",
        "many_descriptors",
    ];
    let made = scene.run(&plan, &[&allowed[..], &refused[..]].concat());
    assert!(allowed.iter().all(|attempt| made.succeeded(attempt)), "{made:?}");
    let breached: Vec<_> = refused.iter().filter(|attempt| !made.failed(attempt)).collect();
    assert!(breached.is_empty(), "{breached:?} of {made:?}");
    for call in CALLS {
        let made = scene.run(&plan, &[call]);
        assert!(made.tried(call) && made.ended_early(), "{call}: {made:?}");
    }
}

#[test]
fn every_namespace_is_its_own_and_the_process_is_known_by_the_hosts_id() {
    if !namespace::inside("every_namespace_is_its_own_and_the_process_is_known_by_the_hosts_id") {
        return;
    }
    let scene = Scene::new();
    let mut plan = scene.all();
    plan.arguments = vec![String::new(), "stay=yes".to_owned()];
    // Something of the agent's that must not be taken along.
    rustix::thread::set_thread_groups(&[rustix::process::Gid::from_raw(4_242)]).unwrap();
    let pid = scene.start(&plan).unwrap();
    let namespace_of = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace_of(&pid.to_string(), name), namespace_of("thread-self", name), "{name}");
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line =
            status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {status}"));
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let Identity { uid, gid } = scene.identity();
    assert_eq!(field("Uid:"), vec![uid.to_string(); 4]);
    assert_eq!(field("Gid:"), vec![gid.to_string(); 4]);
    assert_eq!(field("Groups:"), Vec::<String>::new());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), (vec!["1".to_owned()], vec!["2".to_owned()]));
    // By its own count it is the first and only process there is.
    assert_eq!(field("NSpid:").last().map(String::as_str), Some("1"));
    // Nothing of the host is mounted in it, and nothing that can be written to.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    for line in mounts.lines() {
        let options: Vec<&str> = line.split_whitespace().nth(3).unwrap().split(',').collect();
        assert!(options.contains(&"ro") && options.contains(&"nosuid"), "{line}");
    }
    let code =
        |line: &&str| !line.split_whitespace().nth(3).unwrap().split(',').any(|option| option == "noexec");
    let held = scene.root().files.iter().filter(|file| file.executable).count();
    assert_eq!(mounts.lines().filter(code).count(), held, "{mounts}");
    // And on the host nothing of it is.
    let ours = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!ours.contains(scene.folder().to_str().unwrap()), "{ours}");
    scene.kill(pid);
}

#[test]
fn a_jail_that_cannot_be_built_says_which_step_failed_and_runs_nothing() {
    if !namespace::inside("a_jail_that_cannot_be_built_says_which_step_failed_and_runs_nothing") {
        return;
    }
    use holdfast_jail::plan::{Descriptor, File};
    use holdfast_jail::{LaunchError, Step};
    let scene = Scene::new();
    let absent = scene.folder().join("absent");
    let broken: [(Step, Break<'_>); 6] = [
        (Step::Cgroup, &|plan| plan.cgroup = Some(absent.clone())),
        (Step::Descriptors, &|plan| plan.descriptors = vec![Descriptor::Read(absent.clone())]),
        (Step::Descriptors, &|plan| plan.descriptors = vec![Descriptor::Tap("hfabsent".to_owned())]),
        (Step::Root, &|plan| {
            let root = plan.root.as_mut().unwrap();
            root.files.push(File { path: absent.clone(), executable: false });
        }),
        (Step::Access, &|plan| {
            plan.access = Some(Access { read: vec![absent.clone()], ..Access::default() });
        }),
        (Step::Execute, &|plan| plan.program = absent.clone()),
    ];
    for (step, breaks) in broken {
        let mut plan = scene.all();
        breaks(&mut plan);
        let error = scene.start(&plan).unwrap_err();
        let LaunchError::Step { step: failed, why } = &error else { panic!("{error}") };
        assert_eq!(*failed, step, "{error}");
        assert!(why.contains("absent"), "{error}");
        assert_eq!(scene.output(), "", "nothing may run");
    }
    // A TAP that is not there is not made on the way.
    assert!(!fs::exists("/sys/class/net/hfabsent").unwrap());
    let none = Limits { threads: Some(THREADS_MAX), ..scene.limits() };
    assert!(scene.start(&Plan { limits: none, arguments: vec![String::new()], ..scene.all() }).is_ok());
}

#[test]
fn an_agent_that_dies_before_its_word_leaves_no_process() {
    if !namespace::inside("an_agent_that_dies_before_its_word_leaves_no_process") {
        return;
    }
    let scene = Scene::new();
    let mut plan = scene.all();
    plan.arguments = vec![String::new(), "stay=yes".to_owned()];
    let pid = scene.start_and_abandon(&plan);
    scene.wait_until_gone(pid);
    assert_eq!(scene.output(), "", "nothing may run");
}

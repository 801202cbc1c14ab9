//! What an attacker tries, by name. `Ok` is a success of the attacker's.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Error, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::FromRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::resources;

type Given = BTreeMap<String, String>;
type Outcome = io::Result<String>;

/// More threads than any jail allows.
const THREADS: usize = 2_000;

/// Makes one attempt.
pub(crate) fn attempt(name: &str, given: &Given) -> Outcome {
    if let Some(call) = name.strip_prefix("call_") {
        return system_call(call);
    }
    if let Some(family) = name.strip_prefix("socket_") {
        return socket(family);
    }
    if let Some(outcome) = resources::attempt(name, given) {
        return outcome;
    }
    match name {
        // Files.
        "read_absolute" => read(&path(given, "secret")),
        "read_dotdot" => {
            read(&PathBuf::from("../".repeat(40)).join(path(given, "secret").strip_prefix("/").unwrap()))
        }
        "read_through_proc" => {
            read(&PathBuf::from("/proc/1/root").join(path(given, "secret").strip_prefix("/").unwrap()))
        }
        "read_through_symlink" => {
            let link = path(given, "folder").join("link");
            symlink(path(given, "secret"), &link)?;
            read(&link)
        }
        "read_private" => read(&path(given, "private")),
        "list_root" => {
            let names: Vec<_> =
                fs::read_dir("/")?.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            // An empty root but for what was put there is no success.
            if names.iter().any(|n| n == "home" || n == "root" || n == "sys" || n == "proc") {
                Ok(names.join(" "))
            } else {
                Err(Error::other(names.join(" ")))
            }
        }
        "write_host" => fs::write(path(given, "folder").join("planted"), "x").map(|()| String::new()),
        "write_root" => {
            let planted = "/holdfast-jail-intruder-was-here";
            fs::write(planted, "x")?;
            fs::remove_file(planted).map(|()| String::new())
        }
        "write_own_library" => {
            OpenOptions::new().write(true).open(path(given, "library")).map(|_| String::new())
        }
        "fill_folder" => {
            // Many small files do what one large one may not.
            for n in 0..100 {
                File::create(path(given, "folder").join(format!("f{n}")))?.write_all(&[0; 4096])?;
            }
            Ok("100 files".to_owned())
        }
        "neighbour_socket" => UnixStream::connect(path(given, "neighbour")).map(|_| String::new()),
        "abstract_socket" => {
            let address = std::os::unix::net::SocketAddr::from_abstract_name(given.get("abstract").unwrap())?;
            UnixStream::connect_addr(&address).map(|_| String::new())
        }
        "make_socket" => {
            std::os::unix::net::UnixListener::bind(path(given, "folder").join("s")).map(|_| String::new())
        }
        "random_device" => read(std::path::Path::new("/dev/urandom")),
        "disk_device" => File::open("/dev/loop0").map(|_| String::new()),
        "make_device" => {
            let at = path(given, "folder").join("mem");
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &at,
                rustix::fs::FileType::CharacterDevice,
                rustix::fs::Mode::from_raw_mode(0o600),
                rustix::fs::makedev(1, 3),
            )?;
            File::open(at).map(|_| String::new())
        }
        // Other processes.
        "signal_other" => {
            let victim: i32 = given.get("victim").unwrap().parse().unwrap();
            // SAFETY: a plain system call.
            check(unsafe { libc::kill(victim, 0) }.into())
        }
        "read_other" => read(&PathBuf::from(format!("/proc/{}/cmdline", given.get("victim").unwrap()))),
        "shared_memory" => {
            let key: i32 = given.get("shm").unwrap().parse().unwrap();
            // SAFETY: a plain system call.
            check(unsafe { libc::shmget(key, 1, 0) }.into())
        }
        // The network.
        "control_plane" | "metadata" => {
            let target: SocketAddr = given.get(name).unwrap().parse().unwrap();
            TcpStream::connect_timeout(&target, Duration::from_secs(2)).map(|_| String::new())
        }
        // Rights.
        "become_root" => {
            // SAFETY: a plain system call.
            check(unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) })?;
            // SAFETY: as above.
            check(unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) })
        }
        "become_another" => {
            // SAFETY: a plain system call.
            check(unsafe { libc::syscall(libc::SYS_setresuid, 12_345, 12_345, 12_345) })
        }
        "take_capability" => {
            let all = rustix::thread::CapabilitySet::all();
            let mut sets = rustix::thread::capabilities(None)?;
            if sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN) {
                return Ok("has it".to_owned());
            }
            sets.effective = all;
            sets.permitted = all;
            rustix::thread::set_capabilities(None, sets)?;
            Ok(String::new())
        }
        "bounding_set" => {
            // SAFETY: a plain system call.
            let any = (0..40).any(|n| unsafe { libc::prctl(libc::PR_CAPBSET_READ, n, 0, 0, 0) } == 1);
            if any { Ok("not empty".to_owned()) } else { Err(Error::other("empty")) }
        }
        "gain_privileges_by_exec" => match rustix::thread::no_new_privs()? {
            false => Ok("allowed".to_owned()),
            true => Err(Error::other("no_new_privs is set")),
        },
        // Resources.
        "many_threads" => many_threads(),
        "large_file" => large_file(given),
        "much_memory" => much_memory(given),
        "many_descriptors" => {
            let mut held = Vec::new();
            for _ in 0..5_000 {
                held.push(rustix::io::fcntl_dupfd_cloexec(io::stdout(), 0)?);
            }
            Ok(format!("{} descriptors", held.len()))
        }
        "raise_limits" => {
            let unlimited = rustix::process::Rlimit { current: None, maximum: None };
            rustix::process::setrlimit(rustix::process::Resource::Fsize, unlimited)?;
            Ok(String::new())
        }
        "core_dump" => match rustix::process::getrlimit(rustix::process::Resource::Core).maximum {
            Some(0) => Err(Error::other("no core dump")),
            other => Ok(format!("{other:?}")),
        },
        // What the agent may have left lying about.
        "inherited_descriptor" => {
            let allowed: i32 = given.get("descriptors").unwrap().parse().unwrap();
            // SAFETY: a plain system call.
            let open: Vec<i32> =
                (0..1_024).filter(|n| unsafe { libc::fcntl(*n, libc::F_GETFD) } >= 0).collect();
            if open.iter().all(|n| *n < allowed) {
                Err(Error::other(format!("{open:?}")))
            } else {
                Ok(format!("{open:?}"))
            }
        }
        "environment" => match std::env::vars_os().next() {
            Some((name, _)) => Ok(name.to_string_lossy().into_owned()),
            None => Err(Error::other("empty")),
        },
        "terminal_session" => {
            // SAFETY: plain system calls.
            let own = unsafe { libc::getsid(0) == libc::getpid() };
            if own { Err(Error::other("its own session")) } else { Ok("another's".to_owned()) }
        }
        "host_name" => {
            let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
            if name == "vmm" { Err(Error::other(name)) } else { Ok(name) }
        }
        // Other programs.
        "run_shell" => execute(c"/bin/sh"),
        "run_from_memory" => run_from_memory(),
        other => panic!("no such attempt: {other}"),
    }
}

fn path(given: &Given, name: &str) -> PathBuf {
    PathBuf::from(given.get(name).unwrap_or_else(|| panic!("{name} is needed")))
}

fn read(path: &std::path::Path) -> Outcome {
    let mut text = [0; 16];
    let read = File::open(path)?.read(&mut text)?;
    Ok(format!("{read} bytes"))
}

fn check(result: i64) -> Outcome {
    if result == -1 { Err(Error::last_os_error()) } else { Ok(result.to_string()) }
}

/// Asks with arguments that the kernel refuses in its own words: only those of a wall are a failure.
fn system_call(name: &str) -> Outcome {
    let (number, arguments): (i64, [i64; 5]) = match name {
        "ptrace" => (libc::SYS_ptrace, [0x4321, 0, 0, 0, 0]),
        "mount" => (libc::SYS_mount, [0, 0, 0, 0, 0]),
        "umount" => (libc::SYS_umount2, [0, 0, 0, 0, 0]),
        "open_tree" => (libc::SYS_open_tree, [-1, 0, 0, 0, 0]),
        "fsopen" => (libc::SYS_fsopen, [0, 0, 0, 0, 0]),
        "move_mount" => (libc::SYS_move_mount, [-1, 0, -1, 0, 0xffff]),
        "pivot_root" => (libc::SYS_pivot_root, [0, 0, 0, 0, 0]),
        "chroot" => (libc::SYS_chroot, [0, 0, 0, 0, 0]),
        "unshare" => (libc::SYS_unshare, [0, 0, 0, 0, 0]),
        "setns" => (libc::SYS_setns, [-1, 0, 0, 0, 0]),
        "bpf" => (libc::SYS_bpf, [-1, 0, 0, 0, 0]),
        "keyctl" => (libc::SYS_keyctl, [-1, 0, 0, 0, 0]),
        "add_key" => (libc::SYS_add_key, [0, 0, 0, 0, 0]),
        "init_module" => (libc::SYS_init_module, [0, 0, 0, 0, 0]),
        "finit_module" => (libc::SYS_finit_module, [-1, 0, 0, 0, 0]),
        "kexec_load" => (libc::SYS_kexec_load, [0, 1 << 20, 0, 0xffff, 0]),
        "perf_event_open" => (libc::SYS_perf_event_open, [0, 0, 0, 0, 0]),
        "io_uring_setup" => (libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]),
        "userfaultfd" => (libc::SYS_userfaultfd, [0xffff, 0, 0, 0, 0]),
        "process_vm_readv" => (libc::SYS_process_vm_readv, [1, 0, 0, 0, 0]),
        "open_by_handle_at" => (libc::SYS_open_by_handle_at, [-1, 0, 0, 0, 0]),
        "syslog" => (libc::SYS_syslog, [10, 0, 0, 0, 0]),
        "iopl" => (libc::SYS_iopl, [9, 0, 0, 0, 0]),
        "settimeofday" => (libc::SYS_settimeofday, [1, 0, 0, 0, 0]),
        "sethostname" => (libc::SYS_sethostname, [0, -1, 0, 0, 0]),
        "memfd_create" => (libc::SYS_memfd_create, [0, 0, 0, 0, 0]),
        "namespace_by_clone" => (
            libc::SYS_clone,
            [i64::from(libc::CLONE_NEWNET | libc::CLONE_FS | libc::CLONE_NEWNS), 0, 0, 0, 0],
        ),
        "raise_limit_of_all" => (libc::SYS_prlimit64, [0, 999, 1, 0, 0]),
        "execve" => (libc::SYS_execve, [0, 0, 0, 0, 0]),
        "loop_clr_fd" => (libc::SYS_ioctl, [-1, 0x4C01, 0, 0, 0]),
        "loop_configure" => (libc::SYS_ioctl, [-1, 0x4C0A, 0, 0, 0]),
        other => panic!("no such call: {other}"),
    };
    let [a, b, c, d, e] = arguments;
    // SAFETY: every pointer is null or not one, so nothing is read or written.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    let error = Error::last_os_error();
    match (result, error.raw_os_error()) {
        (-1, Some(libc::EPERM)) => Err(error),
        (-1, _) => Ok(format!("reached the kernel: {error}")),
        _ => Ok("done".to_owned()),
    }
}

fn socket(family: &str) -> Outcome {
    let (family, kind) = match family {
        "inet" => (libc::AF_INET, libc::SOCK_STREAM),
        "inet6" => (libc::AF_INET6, libc::SOCK_DGRAM),
        "netlink" => (libc::AF_NETLINK, libc::SOCK_RAW),
        "packet" => (libc::AF_PACKET, libc::SOCK_RAW),
        "vsock" => (libc::AF_VSOCK, libc::SOCK_STREAM),
        other => panic!("no such family: {other}"),
    };
    // SAFETY: a plain system call; the descriptor is left open until the process ends.
    let made = check(unsafe { libc::socket(family, kind, 0) }.into());
    match made {
        // A family that this kernel does not have is reached all the same.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(error.to_string()),
        made => made,
    }
}

fn many_threads() -> Outcome {
    let mut threads = Vec::new();
    while threads.len() < THREADS {
        let made = std::thread::Builder::new()
            .stack_size(32 * 1024)
            .spawn(|| std::thread::sleep(Duration::from_secs(3_600)));
        match made {
            Ok(thread) => threads.push(thread),
            // A wall that lets a VMM have no threads is no use.
            Err(error) if threads.len() < 8 => panic!("no threads at all: {error}"),
            Err(error) => return Err(Error::other(format!("{} threads, then {error}", threads.len()))),
        }
    }
    Ok(format!("{} threads", threads.len()))
}

/// Writes to the descriptor that it was given.
fn large_file(given: &Given) -> Outcome {
    let bytes: usize = given.get("file_bytes").unwrap().parse().unwrap();
    // SAFETY: the test passes a file as descriptor 3, and nothing else owns it.
    let mut file = unsafe { File::from_raw_fd(3) };
    let mut written = 0;
    while written < 4 * bytes {
        written += file.write(&[b'x'; 4_096])?;
    }
    Ok(format!("{written} bytes"))
}

fn much_memory(given: &Given) -> Outcome {
    let bytes: usize = given.get("data_bytes").unwrap().parse().unwrap();
    // SAFETY: a new private mapping that nothing uses.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            2 * bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(String::new()) }
}

/// In a child where one can be made: a success would otherwise be the end of the attempts.
fn execute(program: &std::ffi::CStr) -> Outcome {
    // SAFETY: the child does nothing but system calls.
    let pid = unsafe { libc::syscall(libc::SYS_clone, i64::from(libc::SIGCHLD), 0, 0, 0, 0) };
    if pid == -1 {
        return Err(Error::last_os_error());
    }
    if pid == 0 {
        let arguments = [program.as_ptr(), c"-c".as_ptr(), c"exit 0".as_ptr(), std::ptr::null()];
        // SAFETY: the vector ends with a null pointer; on success this does not return.
        unsafe {
            libc::execv(program.as_ptr(), arguments.as_ptr());
            libc::_exit(77)
        }
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    unsafe { libc::waitpid(i32::try_from(pid).unwrap(), &mut status, 0) };
    if status == 0 { Ok("ran".to_owned()) } else { Err(Error::other(format!("status {status:#x}"))) }
}

fn run_from_memory() -> Outcome {
    // SAFETY: a plain system call.
    let memory = unsafe { libc::memfd_create(c"x".as_ptr(), 0) };
    if memory < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the descriptor was just made.
    let mut file = unsafe { File::from_raw_fd(memory) };
    file.write_all(&fs::read("/bin/true")?)?;
    Ok("could be executed".to_owned())
}

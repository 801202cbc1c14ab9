//! The launcher: the agent's own binary, run again under a hidden name, that becomes a VMM behind its walls.
//!
//! It is single-threaded from its start, reads its plan from its standard input, a socket to the agent, and takes its
//! steps in one order: what needs the host first (cgroup, descriptors), then the namespaces, then what can only be
//! given up. Each failure is a sentence with its step on the socket, and the end. Nothing of the program runs before
//! the agent has said that it knows the process: an agent that dies before leaves nothing, because the launcher's
//! socket ends with it.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use crate::error::{Failure, InStep, Step};
use crate::namespaces::Side;
use crate::plan::{PLAN_BYTES_MAX, Plan};
use crate::report::{Enforced, GO, Report};
use crate::{access, cgroup, descriptors, filter, identity, limits, namespaces, root};

/// The hidden first argument that makes the agent's binary a launcher.
pub const ARGUMENT: &str = "launch-vmm-in-jail";

/// Becomes the launcher, if the process was started as one. Must be the first thing that `main` does: no thread may run
/// and nothing may be set up yet.
pub fn enter_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next() == Some(OsString::from(ARGUMENT)) && arguments.next().is_none() {
        enter();
    }
}

/// Whether this process is the launcher's first half, whose work is done, or something failed.
const DONE: i32 = 0;
const FAILED: i32 = 111;

fn enter() -> ! {
    let code = match descriptors::take_socket() {
        Ok(socket) => match run(&socket) {
            Ok(()) => DONE,
            Err(Failure { step, why }) => {
                // An agent that is gone needs no answer.
                say(&socket, &Report::Failed { step, why }).ok();
                FAILED
            }
        },
        Err(_) => FAILED,
    };
    std::process::exit(code)
}

fn run(socket: &OwnedFd) -> Result<(), Failure> {
    let plan = read_plan(socket)?;
    if let Some(folder) = &plan.cgroup {
        cgroup::enter(folder).in_step(Step::Cgroup, format_args!("entering '{}'", folder.display()))?;
    }
    let opened = descriptors::open(&plan.descriptors)?;
    if let (Some(tap), Some(identity)) = (&plan.tap, plan.identity) {
        descriptors::hand_over_tap(tap, identity.uid)
            .in_step(Step::Descriptors, format_args!("handing over the TAP device '{tap}'"))?;
    }
    descriptors::empty_input()?;
    match namespaces::enter(&plan.namespaces)? {
        Side::Parent(pid) => {
            say(socket, &Report::Process { pid }).in_step(Step::Namespaces, "telling the process")
        }
        Side::Child => match become_vmm(socket, &plan, opened) {
            Err(failure) => Err(failure),
            Ok(never) => match never {},
        },
    }
}

/// The second half, in the namespaces.
fn become_vmm(socket: &OwnedFd, plan: &Plan, opened: Vec<OwnedFd>) -> Result<Infallible, Failure> {
    namespaces::settle(&plan.namespaces)?;
    if let Some(root) = &plan.root {
        root::enter(root, plan.identity)?;
    }
    // From inside: what is executed is what the jail holds.
    let program = std::fs::File::open(&plan.program)
        .map(OwnedFd::from)
        .in_step(Step::Execute, format_args!("opening '{}'", plan.program.display()))?;
    let program = descriptors::move_aside(program)?;
    let (name, arguments) = command_line(plan)?;
    // Compiled before the limits are set, which may allow less memory than that takes.
    let filters = match &plan.filter {
        Some(filter) => filter::compile(filter, program.as_fd())?,
        None => Vec::new(),
    };
    descriptors::arrange(opened)?;
    limits::set(&plan.limits)?;
    identity::drop_root(plan.identity, plan.no_capabilities)?;
    let access = match &plan.access {
        Some(access) => access::restrict(access)?,
        None => Enforced::NotAsked,
    };
    say(socket, &Report::Ready { access }).in_step(Step::Execute, "telling that the jail is ready")?;
    wait_for_word(socket)?;
    filter::install(&filters)?;
    execute(&program, &name, &arguments)
}

fn read_plan(socket: &OwnedFd) -> Result<Plan, Failure> {
    let mut stream = stream(socket).in_step(Step::Plan, "opening the agent's socket")?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).in_step(Step::Plan, "reading the plan's length")?;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > PLAN_BYTES_MAX {
        return Err(Failure::new(Step::Plan, format!("a plan of {length} bytes is too long")));
    }
    let mut document = vec![0; length];
    stream.read_exact(&mut document).in_step(Step::Plan, "reading the plan")?;
    Plan::decode(&document).in_step(Step::Plan, "understanding the plan")
}

fn wait_for_word(socket: &OwnedFd) -> Result<(), Failure> {
    let mut word = [0];
    let read = stream(socket).and_then(|mut stream| stream.read_exact(&mut word));
    read.in_step(Step::Execute, "waiting for the agent's word")?;
    if word == [GO] {
        Ok(())
    } else {
        Err(Failure::new(Step::Execute, "the agent said something else than to go on"))
    }
}

fn say(socket: &OwnedFd, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    stream(socket)?.write_all(&line)
}

fn stream(socket: &OwnedFd) -> io::Result<UnixStream> {
    Ok(UnixStream::from(socket.try_clone()?))
}

fn command_line(plan: &Plan) -> Result<(CString, Vec<CString>), Failure> {
    let text = |bytes: &[u8]| CString::new(bytes).in_step(Step::Execute, "making the command line");
    let arguments = plan.arguments.iter().map(|argument| text(argument.as_bytes()));
    Ok((text(std::ffi::OsStr::new(&plan.name).as_bytes())?, arguments.collect::<Result<_, _>>()?))
}

/// With an empty environment.
fn execute(program: &OwnedFd, name: &CString, arguments: &[CString]) -> Result<Infallible, Failure> {
    let vector: Vec<*const libc::c_char> = std::iter::once(name)
        .chain(arguments)
        .map(|text| text.as_ptr())
        .chain(std::iter::once(std::ptr::null()))
        .collect();
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: both vectors end with a null pointer and hold strings that end with a zero byte and live through the
    // call, which does not return if it succeeds.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            vector.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(io::Error::last_os_error()).in_step(Step::Execute, "execveat")
}

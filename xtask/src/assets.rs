//! What every microVM boots from: the guest kernel and the archive that holds its init, in `target/assets`.
//!
//! The kernel is built once per configuration and source version (minutes) and kept outside the repository, under
//! the user's cache folder; the init is built each time (cargo knows when there is nothing to do). The Debian
//! packages must be installed before.

use crate::cpio::{Entry, archive};
use crate::step::{Failure, run, step};
use crate::workspace::{assets, cargo, root, target};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SOURCE_PACKAGE: &str = "linux-source-6.1";
const SOURCE_ARCHIVE: &str = "/usr/src/linux-source-6.1.tar.xz";
const SOURCE_FOLDER: &str = "linux-source-6.1";
const CONFIG: &str = "kernel/microvm-x86_64.config";
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Processes of the kernel's build.
const KERNEL_JOBS: &str = "-j2";

/// Part of the cache's key: raise it when the way of building changes.
const RECIPE_VERSION: &str = "1";

/// Puts `vmlinux` and `initramfs.cpio` into `target/assets`.
pub(crate) fn build() -> Result<(), Failure> {
    let folder = assets();
    fs::create_dir_all(&folder).map_err(|e| failed("create", &folder, &e))?;
    let kernel = kernel()?;
    replace(&folder.join("vmlinux"), &read(&kernel)?)?;
    let init = step("build the guest's init", init)?;
    let content = read(&init)?;
    // Without its console the kernel would start init with no standard files at all.
    let archive = archive(&[
        Entry::Folder { name: "dev" },
        Entry::Device { name: "dev/console", major: 5, minor: 1 },
        Entry::Program { name: "init", content: &content },
    ]);
    replace(&folder.join("initramfs.cpio"), &archive)
}

/// The kernel, from the cache or built into it.
fn kernel() -> Result<PathBuf, Failure> {
    let config = root().join(CONFIG);
    let key = cache_key(&config)?;
    let cache = cache_folder()?;
    fs::create_dir_all(&cache).map_err(|e| failed("create", &cache, &e))?;
    let kept = cache.join(format!("kernel-{key}"));
    let vmlinux = kept.join("vmlinux");
    // Two runs at once must not build in the same folder.
    let lock = cache.join("kernel.lock");
    let lock_file = File::create(&lock).map_err(|e| failed("create", &lock, &e))?;
    lock_file.lock().map_err(|e| failed("lock", &lock, &e))?;
    if !vmlinux.is_file() {
        let work = cache.join("kernel-build");
        remove(&work)?;
        fs::create_dir_all(&work).map_err(|e| failed("create", &work, &e))?;
        let built = step("build the guest kernel (once; some minutes)", || compile(&work, &config))?;
        fs::create_dir_all(&kept).map_err(|e| failed("create", &kept, &e))?;
        replace(&vmlinux, &read(&built)?)?;
        remove(&work)?;
    }
    Ok(vmlinux)
}

fn compile(work: &Path, config: &Path) -> Result<PathBuf, Failure> {
    run(Command::new("tar").arg("-xf").arg(SOURCE_ARCHIVE).arg("-C").arg(work))?;
    let source = work.join(SOURCE_FOLDER);
    let make = || {
        let mut command = Command::new("nice");
        // The same source gives the same bytes, whoever builds it and when.
        command
            .args(["make", "-s", KERNEL_JOBS])
            .current_dir(&source)
            .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
            .env("KBUILD_BUILD_USER", "holdfast")
            .env("KBUILD_BUILD_HOST", "holdfast")
            .env("KCONFIG_ALLCONFIG", config)
            .stdin(Stdio::null());
        command
    };
    run(make().arg("allnoconfig"))?;
    check_config(config, &source.join(".config"))?;
    run(make().arg("vmlinux"))?;
    Ok(source.join("vmlinux"))
}

/// The kernel's build drops what it cannot satisfy without a word: a guest would then fail in odd ways.
fn check_config(asked: &Path, got: &Path) -> Result<(), Failure> {
    let text = |path: &Path| fs::read_to_string(path).map_err(|e| failed("read", path, &e));
    let (asked_text, got_text) = (text(asked)?, text(got)?);
    let in_force: Vec<&str> = got_text.lines().collect();
    let lost: Vec<&str> =
        asked_text.lines().filter(|line| line.starts_with("CONFIG_") && !in_force.contains(line)).collect();
    if lost.is_empty() {
        return Ok(());
    }
    Err(Failure(format!(
        "the kernel's configuration did not take {} from {}; what they depend on is missing",
        lost.join(", "),
        asked.display()
    )))
}

/// Builds PID 1, static, in a target folder of its own: other flags would rebuild everything in the shared one.
fn init() -> Result<PathBuf, Failure> {
    let folder = target().join("guest-build");
    run(cargo(&["build", "--quiet", "--locked", "--profile", "guest", "--package", "holdfast-guest"])
        .args(["--bin", "holdfast-init", "--target", GUEST_TARGET, "--target-dir"])
        .arg(&folder)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(folder.join(GUEST_TARGET).join("guest/holdfast-init"))
}

/// A hash of everything that decides what the kernel becomes.
fn cache_key(config: &Path) -> Result<String, Failure> {
    let version = output(Command::new("dpkg-query").args(["-W", "-f=${Version}", SOURCE_PACKAGE]))?;
    let mut hasher = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| Failure(format!("cannot start `sha256sum`: {e}")))?;
    if let Some(mut stdin) = hasher.stdin.take() {
        let text = [read(config)?, version, RECIPE_VERSION.as_bytes().to_vec()].join(&b'\n');
        stdin
            .write_all(&text)
            .map_err(|e| Failure(format!("cannot hash the kernel's configuration: {e}")))?;
    }
    let hashed =
        hasher.wait_with_output().map_err(|e| Failure(format!("cannot read from `sha256sum`: {e}")))?;
    let digest: String = String::from_utf8_lossy(&hashed.stdout).chars().take(16).collect();
    if digest.len() == 16 { Ok(digest) } else { Err(Failure("`sha256sum` printed no digest".to_owned())) }
}

fn cache_folder() -> Result<PathBuf, Failure> {
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .map(|cache| cache.join("holdfast"))
        .ok_or_else(|| {
            Failure("neither XDG_CACHE_HOME nor HOME is set; set one, it will hold the kernel".to_owned())
        })
}

fn output(command: &mut Command) -> Result<Vec<u8>, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| Failure(format!("cannot start `{program}`: {e}")))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(Failure(format!(
            "`{program}` ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }
}

/// Writes a file whole or not at all, and leaves one that is right alone: its date tells others that it changed.
fn replace(path: &Path, content: &[u8]) -> Result<(), Failure> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let fresh = path.with_extension("new");
    fs::write(&fresh, content).and_then(|()| fs::rename(&fresh, path)).map_err(|e| failed("write", path, &e))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|e| failed("read", path, &e))
}

fn remove(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed("remove", folder, &e)),
        _ => Ok(()),
    }
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure(format!("cannot {what} {}: {error}", path.display()))
}

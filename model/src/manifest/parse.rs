//! From text to a checked [`Manifest`]. Serde refuses unknown keys and wrong types with their line; the rules that
//! span several keys are checked after, and name the key that breaks them.

use super::quantity::{mebibytes, milliseconds};
use super::{
    Health, HealthCheck, Manifest, Mount, Port, Process, Resources, Restart, RestartPolicy, Scaling, Volume,
};
use crate::limits;
use crate::{AppName, PortName, ProcessName, VolumeName};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use toml::Spanned;

/// Why a manifest was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// It is too long to be one.
    #[error("the manifest has {bytes} bytes; at most {} are allowed", limits::MANIFEST_BYTES_MAX)]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
    },
    /// It is not TOML, or has a key that does not exist or a value of the wrong type.
    #[error("line {line} of the manifest: {what}")]
    Syntax {
        /// From 1.
        line: usize,
        /// What the parser found.
        what: String,
    },
    /// A value breaks a rule.
    #[error("line {line} of the manifest: `{key}` {what}")]
    Rule {
        /// From 1.
        line: usize,
        /// The key, as in `processes.web.ports`.
        key: String,
        /// The rule, as a sentence's end.
        what: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    schema_version: Spanned<String>,
    app: RawApp,
    image: Option<RawImage>,
    env: Option<RawEnv>,
    processes: Spanned<BTreeMap<Spanned<String>, Spanned<RawProcess>>>,
    #[serde(default)]
    volumes: Vec<Spanned<RawVolume>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawApp {
    name: AppName,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawImage {
    r#ref: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEnv {
    #[serde(default)]
    vars: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProcess {
    command: Option<Vec<String>>,
    workdir: Option<String>,
    user: Option<String>,
    #[serde(default)]
    vars: BTreeMap<String, String>,
    restart: Option<RawRestart>,
    resources: RawResources,
    scaling: Option<RawScaling>,
    #[serde(default)]
    ports: Vec<RawPort>,
    health: Option<RawHealth>,
    #[serde(default)]
    mounts: Vec<RawMount>,
    secrets: Option<RawSecrets>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRestart {
    policy: Option<RestartPolicy>,
    max_retries: Option<u32>,
    backoff: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawResources {
    memory: String,
    cpu: Option<f64>,
    disk: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScaling {
    min: Option<u32>,
    max: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPort {
    name: PortName,
    internal: u16,
    protocol: Option<RawProtocol>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawProtocol {
    Tcp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHealth {
    tcp: Option<bool>,
    http: Option<bool>,
    command: Option<Vec<String>>,
    port: Option<PortName>,
    path: Option<String>,
    interval: Option<String>,
    timeout: Option<String>,
    grace: Option<String>,
    success: Option<u32>,
    failure: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMount {
    volume: VolumeName,
    path: String,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSecrets {
    #[serde(default)]
    required: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolume {
    name: VolumeName,
    size: String,
    filesystem: Option<String>,
    #[serde(default)]
    backup: bool,
}

/// Mount targets that the guest's init owns.
const RESERVED_MOUNTS: &[&str] = &["/", "/proc", "/sys", "/dev", "/run", "/tmp"];

/// Parses and checks a manifest.
///
/// # Errors
/// The first thing that is wrong, with its line. Never panics, whatever the bytes.
pub fn parse(text: &str) -> Result<Manifest, ManifestError> {
    if text.len() > limits::MANIFEST_BYTES_MAX {
        return Err(ManifestError::TooLong { bytes: text.len() });
    }
    let raw: RawManifest = toml::from_str(text).map_err(|e| {
        let start = e.span().map_or(0, |s| s.start);
        ManifestError::Syntax { line: line_at(text, start), what: e.message().to_owned() }
    })?;
    Checker { text }.manifest(raw)
}

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count()
}

/// Holds the text so that each rule can name the line that breaks it.
struct Checker<'t> {
    text: &'t str,
}

/// Where a rule is checked: the key's path and its offset in the text.
#[derive(Clone)]
struct At {
    key: String,
    offset: usize,
}

impl At {
    fn child(&self, name: &str) -> Self {
        Self { key: format!("{}.{name}", self.key), offset: self.offset }
    }
}

impl Checker<'_> {
    fn fail<T>(&self, at: &At, what: impl Into<String>) -> Result<T, ManifestError> {
        Err(ManifestError::Rule {
            line: line_at(self.text, at.offset),
            key: at.key.clone(),
            what: what.into(),
        })
    }

    fn manifest(&self, raw: RawManifest) -> Result<Manifest, ManifestError> {
        let version_at = At { key: "schema_version".into(), offset: raw.schema_version.span().start };
        if raw.schema_version.as_ref() != "v1" {
            return self.fail(&version_at, "must be \"v1\", the only version that there is");
        }
        let processes_at = At { key: "processes".into(), offset: raw.processes.span().start };
        let processes = raw.processes.into_inner();
        if processes.is_empty() || processes.len() > limits::PROCESSES_MAX {
            return self.fail(&processes_at, format!("must hold 1–{} process types", limits::PROCESSES_MAX));
        }
        let volumes = self.volumes(raw.volumes)?;
        let shared = raw.env.map(|e| e.vars).unwrap_or_default();
        self.vars(&At { key: "env.vars".into(), offset: 0 }, &shared)?;
        let mut out = BTreeMap::new();
        let mut mounted = BTreeSet::new();
        for (name, process) in processes {
            let at = At { key: format!("processes.{}", name.as_ref()), offset: name.span().start };
            let name: ProcessName = match name.as_ref().parse() {
                Ok(name) => name,
                Err(e) => return self.fail(&at, format!("is misnamed: {e}")),
            };
            let process = self.process(&at, process.into_inner(), &shared, &volumes)?;
            if let Some(twice) = process.mounts.iter().find(|m| !mounted.insert(m.volume.clone())) {
                let what = format!("mounts «{}» a second time, and only one can have it", twice.volume);
                return self.fail(&at.child("mounts"), what);
            }
            out.insert(name, process);
        }
        Ok(Manifest { app: raw.app.name, image: raw.image.map(|i| i.r#ref), processes: out, volumes })
    }

    fn volumes(&self, raw: Vec<Spanned<RawVolume>>) -> Result<BTreeMap<VolumeName, Volume>, ManifestError> {
        let mut volumes = BTreeMap::new();
        for spanned in raw {
            let offset = spanned.span().start;
            let v = spanned.into_inner();
            let at = At { key: format!("volumes.{}", v.name), offset };
            if v.filesystem.as_deref().is_some_and(|f| f != "ext4") {
                return self.fail(&at.child("filesystem"), "must be \"ext4\"");
            }
            let size_mib = self.size(&at.child("size"), &v.size)?;
            if !(limits::VOLUME_MIB_MIN..=limits::VOLUME_MIB_MAX).contains(&size_mib) {
                return self.fail(&at.child("size"), "must be at least 16Mi and at most 16Ti");
            }
            if volumes.len() >= limits::VOLUMES_MAX {
                return self.fail(&at, format!("is one too many: at most {} volumes", limits::VOLUMES_MAX));
            }
            if volumes.insert(v.name.clone(), Volume { size_mib, backup: v.backup }).is_some() {
                return self.fail(&at, "is declared twice");
            }
        }
        Ok(volumes)
    }

    fn process(
        &self,
        at: &At,
        raw: RawProcess,
        shared: &BTreeMap<String, String>,
        volumes: &BTreeMap<VolumeName, Volume>,
    ) -> Result<Process, ManifestError> {
        let scaling = self.scaling(&at.child("scaling"), raw.scaling)?;
        let ports = self.ports(&at.child("ports"), raw.ports)?;
        let health = raw.health.map(|h| self.health(&at.child("health"), h, &ports)).transpose()?;
        let mounts = self.mounts(&at.child("mounts"), raw.mounts, volumes)?;
        if !mounts.is_empty() && scaling.max > 1 {
            return self.fail(&at.child("scaling"), "must have max = 1 because the process mounts a volume");
        }
        if let Some(argv) = &raw.command {
            self.argv(&at.child("command"), argv)?;
        }
        if raw.workdir.as_deref().is_some_and(|w| !w.starts_with('/') || w.contains('\0')) {
            return self.fail(&at.child("workdir"), "must be an absolute path");
        }
        self.vars(&at.child("vars"), &raw.vars)?;
        let mut vars = shared.clone();
        vars.extend(raw.vars);
        let secrets_required = raw.secrets.map(|s| s.required).unwrap_or_default();
        if secrets_required.len() > limits::SECRETS_MAX || !secrets_required.iter().all(|k| is_env_key(k)) {
            return self.fail(&at.child("secrets.required"), "must be at most 256 keys of A–Z, 0–9 and «_»");
        }
        Ok(Process {
            command: raw.command,
            workdir: raw.workdir,
            user: raw.user,
            vars,
            restart: self.restart(&at.child("restart"), raw.restart)?,
            resources: self.resources(&at.child("resources"), raw.resources)?,
            scaling,
            ports,
            health,
            mounts,
            secrets_required,
        })
    }

    fn scaling(&self, at: &At, raw: Option<RawScaling>) -> Result<Scaling, ManifestError> {
        let (min, max) = raw.map_or((None, None), |s| (s.min, s.max));
        let min = min.unwrap_or_else(|| max.unwrap_or(1).min(1));
        let max = max.unwrap_or_else(|| min.max(1));
        if min > max || max > limits::SCALE_MAX {
            return self.fail(at, format!("must keep min ≤ max ≤ {}", limits::SCALE_MAX));
        }
        Ok(Scaling { min, max })
    }

    fn restart(&self, at: &At, raw: Option<RawRestart>) -> Result<Restart, ManifestError> {
        let raw = raw.unwrap_or(RawRestart { policy: None, max_retries: None, backoff: None });
        let backoff_ms =
            raw.backoff.map(|b| self.time(&at.child("backoff"), &b)).transpose()?.unwrap_or(2_000);
        Ok(Restart {
            policy: raw.policy.unwrap_or(RestartPolicy::Always),
            max_retries: raw.max_retries.unwrap_or(3).min(1_000),
            backoff_ms: backoff_ms.clamp(100, 300_000),
        })
    }

    fn resources(&self, at: &At, raw: RawResources) -> Result<Resources, ManifestError> {
        let memory_mib = self.size(&at.child("memory"), &raw.memory)?;
        if !(limits::MEMORY_MIB_MIN..=limits::MEMORY_MIB_MAX).contains(&memory_mib) {
            return self.fail(&at.child("memory"), "must be at least 64Mi and at most 1Ti");
        }
        // Rounded here, at the boundary: nothing inside the state machine sees a floating-point number.
        let cpu = raw.cpu.unwrap_or(1.0);
        let cpu_max = limits::CPU_MILLI_MAX as f64 / 1000.0;
        if !cpu.is_finite() || cpu < 0.001 || cpu > cpu_max {
            return self.fail(&at.child("cpu"), "must be between 0.001 and 64");
        }
        let disk_mib = raw.disk.map(|d| self.size(&at.child("disk"), &d)).transpose()?.unwrap_or(4 << 10);
        if disk_mib < limits::DISK_MIB_MIN {
            return self.fail(&at.child("disk"), "must be at least 1Gi");
        }
        Ok(Resources { memory_mib, cpu_milli: (cpu * 1000.0).round() as u64, disk_mib })
    }

    fn ports(&self, at: &At, raw: Vec<RawPort>) -> Result<Vec<Port>, ManifestError> {
        if raw.len() > limits::PORTS_MAX {
            return self.fail(at, format!("holds more than {} ports", limits::PORTS_MAX));
        }
        let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
        let mut ports = Vec::with_capacity(raw.len());
        for port in raw {
            let _: Option<RawProtocol> = port.protocol;
            if port.internal == 0 || !numbers.insert(port.internal) || !names.insert(port.name.clone()) {
                return self.fail(at, "must have distinct names and distinct numbers from 1 to 65535");
            }
            ports.push(Port { name: port.name, internal: port.internal });
        }
        Ok(ports)
    }

    fn health(&self, at: &At, raw: RawHealth, ports: &[Port]) -> Result<Health, ManifestError> {
        let port = |wanted: &Option<PortName>| match wanted {
            None if ports.len() == 1 => Ok(ports[0].internal),
            None => self.fail(&at.child("port"), "must name one of the process's ports"),
            Some(name) => match ports.iter().find(|p| p.name == *name) {
                Some(found) => Ok(found.internal),
                None => self
                    .fail(&at.child("port"), format!("names «{name}», which the process does not declare")),
            },
        };
        let kinds = (raw.tcp.unwrap_or(false), raw.http.unwrap_or(false), raw.command);
        let check = match kinds {
            (true, false, None) => HealthCheck::Tcp { port: port(&raw.port)? },
            (false, true, None) => {
                let path = raw.path.unwrap_or_else(|| "/".into());
                if !path.starts_with('/') || path.len() > 1024 || path.bytes().any(|b| b <= b' ' || b == 0x7f)
                {
                    return self.fail(
                        &at.child("path"),
                        "must begin with «/» and have no spaces or control characters",
                    );
                }
                HealthCheck::Http { port: port(&raw.port)?, path }
            }
            (false, false, Some(argv)) => {
                self.argv(&at.child("command"), &argv)?;
                HealthCheck::Command { argv }
            }
            _ => {
                return self
                    .fail(at, "needs exactly one of `tcp = true`, `http = true` or `command = [...]`");
            }
        };
        let time = |name: &str, text: Option<String>, default: u64| match text {
            None => Ok(default),
            Some(text) => self.time(&at.child(name), &text),
        };
        Ok(Health {
            check,
            interval_ms: time("interval", raw.interval, 10_000)?.clamp(100, 3_600_000),
            timeout_ms: time("timeout", raw.timeout, 2_000)?.clamp(10, 60_000),
            grace_ms: time("grace", raw.grace, 10_000)?.min(600_000),
            success: raw.success.unwrap_or(1).clamp(1, 100),
            failure: raw.failure.unwrap_or(3).clamp(1, 100),
        })
    }

    fn mounts(
        &self,
        at: &At,
        raw: Vec<RawMount>,
        volumes: &BTreeMap<VolumeName, Volume>,
    ) -> Result<Vec<Mount>, ManifestError> {
        if raw.len() > limits::MOUNTS_MAX {
            return self.fail(at, format!("holds more than {} mounts", limits::MOUNTS_MAX));
        }
        let mut paths = BTreeSet::new();
        let mut mounts = Vec::with_capacity(raw.len());
        for m in raw {
            if !volumes.contains_key(&m.volume) {
                return self.fail(at, format!("names the volume «{}», which is not declared", m.volume));
            }
            let clean = m.path.starts_with('/')
                && !m.path.contains('\0')
                && m.path.split('/').skip(1).all(|s| !s.is_empty() && s != "." && s != "..");
            let reserved = RESERVED_MOUNTS
                .iter()
                .any(|r| m.path == *r || (*r != "/" && m.path.starts_with(&format!("{r}/"))));
            let below = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.starts_with('/'));
            let nested = paths.iter().any(|other: &String| below(other, &m.path) || below(&m.path, other));
            if !clean || reserved || nested || m.path.len() > 255 || !paths.insert(m.path.clone()) {
                return self.fail(at, format!("has «{}», which is not a free absolute path", m.path));
            }
            mounts.push(Mount { volume: m.volume, path: m.path, read_only: m.read_only });
        }
        Ok(mounts)
    }

    fn argv(&self, at: &At, argv: &[String]) -> Result<(), ManifestError> {
        let ok = !argv.is_empty()
            && argv.len() <= limits::COMMAND_ARGS_MAX
            && !argv[0].is_empty()
            && argv.iter().all(|a| !a.contains('\0'));
        if ok {
            Ok(())
        } else {
            self.fail(at, "must be a program and at most 127 arguments, none with a NUL")
        }
    }

    fn vars(&self, at: &At, vars: &BTreeMap<String, String>) -> Result<(), ManifestError> {
        if vars.len() > limits::VARS_MAX {
            return self.fail(at, format!("holds more than {} variables", limits::VARS_MAX));
        }
        for (key, value) in vars {
            let key_ok = !key.is_empty() && key.len() <= 128 && !key.contains(['=', '\0']);
            if !key_ok || value.len() > limits::VAR_VALUE_BYTES_MAX || value.contains('\0') {
                return self.fail(at, format!("has «{key}», which is no variable of at most 64 KiB"));
            }
        }
        Ok(())
    }

    fn size(&self, at: &At, text: &str) -> Result<u64, ManifestError> {
        mebibytes(text).or_else(|how| self.fail(at, format!("is «{text}»: {how}")))
    }

    fn time(&self, at: &At, text: &str) -> Result<u64, ManifestError> {
        milliseconds(text).or_else(|how| self.fail(at, format!("is «{text}»: {how}")))
    }
}

fn is_env_key(key: &str) -> bool {
    let bytes = key.as_bytes();
    matches!(bytes.first(), Some(b'A'..=b'Z' | b'_'))
        && bytes.len() <= 128
        && bytes.iter().all(|b| matches!(b, b'A'..=b'Z' | b'0'..=b'9' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"
schema_version = "v1"
[app]
name = "hello"
[env]
vars = { GREETING = "hi" }
[processes.web]
command = ["/bin/web", "--port", "8443"]
resources = { memory = "64Mi", cpu = 0.5 }
scaling = { min = 2, max = 4 }
ports = [{ name = "https", internal = 8443, protocol = "tcp" }]
health = { tcp = true, port = "https", interval = "500ms" }
"#;

    #[test]
    fn a_good_manifest_is_filled_with_defaults() {
        let m = parse(GOOD).unwrap();
        let web = &m.processes[&"web".parse().unwrap()];
        assert_eq!(web.resources, Resources { memory_mib: 64, cpu_milli: 500, disk_mib: 4096 });
        assert_eq!(web.scaling, Scaling { min: 2, max: 4 });
        assert_eq!(web.restart, Restart { policy: RestartPolicy::Always, max_retries: 3, backoff_ms: 2000 });
        assert_eq!(web.health.as_ref().unwrap().check, HealthCheck::Tcp { port: 8443 });
        assert_eq!(web.vars["GREETING"], "hi");
        let bytes = postcard::to_stdvec(&m).unwrap();
        assert_eq!(postcard::from_bytes::<Manifest>(&bytes).unwrap(), m);
    }

    #[test]
    fn one_replica_is_the_default() {
        let m = parse(&GOOD.replace("scaling = { min = 2, max = 4 }\n", "")).unwrap();
        assert_eq!(m.processes[&"web".parse().unwrap()].scaling, Scaling { min: 1, max: 1 });
    }

    #[test]
    fn i14_every_mistake_names_its_line() {
        let cases = [
            ("name = \"hello\"", "nmae = \"hello\"", 4),
            ("memory = \"64Mi\"", "memory = \"63Mi\"", 7),
            ("memory = \"64Mi\"", "memory = 64", 9),
            ("cpu = 0.5", "cpu = 65.0", 7),
            ("schema_version = \"v1\"", "schema_version = \"v2\"", 2),
            ("port = \"https\"", "port = \"http\"", 7),
            ("max = 4", "max = 101", 7),
            ("[processes.web]", "[processes.Web]", 7),
            ("tcp = true", "tcp = true, http = true", 7),
            ("internal = 8443", "internal = 0", 7),
        ];
        for (from, to, expected) in cases {
            let line = match parse(&GOOD.replacen(from, to, 1)) {
                Err(ManifestError::Syntax { line, .. } | ManifestError::Rule { line, .. }) => line,
                other => panic!("{to}: {other:?}"),
            };
            assert_eq!(line, expected, "{to}");
        }
    }

    #[test]
    fn a_volume_holds_its_process_to_one_instance() {
        let with = format!(
            "{GOOD}mounts = [{{ volume = \"data\", path = \"/data\" }}]\n[[volumes]]\nname = \"data\"\nsize = \"1Gi\"\n"
        );
        assert!(
            matches!(parse(&with), Err(ManifestError::Rule { key, .. }) if key == "processes.web.scaling")
        );
        let one = with.replace("min = 2, max = 4", "max = 1");
        assert_eq!(parse(&one).unwrap().volumes.len(), 1);
        assert!(parse(&one.replace("/data", "/run/x")).is_err());
        assert!(parse(&one.replace("/data", "/a/../b")).is_err());
    }

    proptest! {
        #[test]
        fn i14_no_text_panics(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn i14_no_mutation_of_a_good_manifest_panics(at in 0..GOOD.len(), with in "\\PC{0,3}") {
            if GOOD.is_char_boundary(at) {
                let mut text = GOOD.to_owned();
                text.replace_range(at..at, &with);
                let _ = parse(&text);
            }
        }
    }
}

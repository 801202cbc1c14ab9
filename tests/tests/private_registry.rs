//! An image in a private registry: deployed by its tag with the credential that the org keeps, and pulled again by its
//! node while no server answers (I5). Whoever deploys has no login, and the credential is at rest nowhere in clear (I10).

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_tests::cluster::{Cluster, Options, signal, wait_for};
use holdfast_tests::load::Target;
use holdfast_tests::oci::registry::{PASSWORD, USER};
use holdfast_tests::oci::webapp::WebappTls;
use holdfast_tests::oci::{Registry, webapp};
use holdfast_tests::{netns, shop};
use rustix::process::Signal;
use std::process::Output;
use std::time::Duration;

const PORT: u16 = 8443;
/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(120);

fn ask(cluster: &Cluster, arguments: &[&str]) -> Output {
    let mut all = vec!["--org", "acme", "--app", "shop", "--env", "prod"];
    all.extend(arguments);
    cluster.holdfast(&all).unwrap()
}

fn run(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = ask(cluster, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn i05_i10_a_private_image_is_deployed_by_tag_and_comes_back_without_any_server() {
    netns::enter().unwrap();
    let registry = Registry::start_private().await.unwrap();
    let tls = WebappTls::generate(shop::HOSTNAME).unwrap();
    let image = webapp::push(&registry.host_with_login(), "team/shop", "one", &tls).await.unwrap();
    let mut cluster = Cluster::start(Options::WHOLE).unwrap();
    for made in [["org", "create", "acme"], ["app", "create", "shop"], ["env", "create", "prod"]] {
        run(&cluster, &made);
    }
    let manifest = shop::write_manifest(&cluster, 1).unwrap();
    let by_tag = format!("{}/team/shop:one", registry.host());
    let deploy = ["--json", "deploy", "--file", &manifest, "--image", &by_tag];
    let refused = ask(&cluster, &deploy);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("holdfast registry set"), "{said}");

    // Not below the cluster's folder, which is searched.
    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), PASSWORD).unwrap();
    let file = password.path().display().to_string();
    let host = registry.host();
    // The org's: no app is named.
    let set = ["--org", "acme", "registry", "set", host, "--user", USER, "--password-file", &file];
    let output = cluster.holdfast(&set).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let deployment: serde_json::Value = serde_json::from_str(&run(&cluster, &deploy)).unwrap();
    assert_eq!(deployment["state"], "complete");
    let releases: serde_json::Value = serde_json::from_str(&run(&cluster, &["--json", "releases"])).unwrap();
    assert_eq!(releases[0]["image"]["digest"], image.digest.as_str());
    run(&cluster, &["route", "add", shop::HOSTNAME, "--port", "https", "--listen", &PORT.to_string()]);
    let target = Target::new(([127, 0, 0, 1], PORT).into(), shop::HOSTNAME, &tls.ca_pem).unwrap();
    wait_for("the page", COME_MAX, || target.get("/").outcome.ok()).unwrap();

    // Every server is gone, and so is what the node had pulled: its own disk has the credential, sealed.
    let before = wait_for("one microVM", COME_MAX, || {
        shop::machines(&cluster).ok().filter(|machines| machines.len() == 1)
    });
    let (instance, pid) = before.unwrap()[0].clone();
    let everything: Vec<String> = cluster.record().processes.iter().map(|p| p.name.clone()).collect();
    cluster.kill(&everything).unwrap();
    signal(pid, Signal::KILL);
    std::fs::remove_dir_all(cluster.process("node-1").unwrap().data_dir.join("images")).unwrap();
    for agent in ["edge-1", "node-1"] {
        cluster.restart(agent).unwrap();
    }
    wait_for("the microVM to come back", COME_MAX, || {
        let now = shop::machines(&cluster).ok()?;
        now.iter().any(|(id, now)| *id == instance && *now != pid).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}\n{}", cluster.log_ends()));
    wait_for("the page, without any server", COME_MAX, || target.get("/").outcome.ok()).unwrap();

    let basic = data_encoding::BASE64.encode(format!("{USER}:{PASSWORD}").as_bytes());
    let encoded = data_encoding::BASE64.encode(PASSWORD.as_bytes());
    for path in cluster.files().unwrap() {
        // What a process removed meanwhile is not at rest.
        let Ok(bytes) = std::fs::read(&path) else { continue };
        for spelling in [PASSWORD, &basic, &encoded] {
            let holds = bytes.windows(spelling.len()).any(|w| w == spelling.as_bytes());
            assert!(!holds, "{} holds the credential", path.display());
        }
    }
    cluster.end().unwrap();
}

//! Bytes that no member would send (I14).

use std::time::Duration;

use holdfast_identity::{
    Authority, Credential, PrivateKey, Subject, member_server_name, mutual_client_config,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::group::{CLUSTER, Group, PATIENCE};

async fn connect(
    group: &Group,
    to: u64,
    authority: &Authority,
    subject: Subject,
) -> std::io::Result<TlsStream<TcpStream>> {
    let key = PrivateKey::generate().unwrap();
    let request = key.signing_request().unwrap();
    let life = Duration::from_secs(3600);
    let issued = authority.issue(&request, &subject, life, std::time::SystemTime::now()).unwrap();
    let credential = Credential::new(key, &issued.chain_pem).unwrap();
    let config = mutual_client_config(&credential, group.authority().certificate()).unwrap();
    let tcp = TcpStream::connect(group.node(to).raft_addr).await?;
    let name = member_server_name(CLUSTER, &to.to_string()).unwrap();
    let mut stream = TlsConnector::from(config).connect(name, tcp).await?;
    stream.flush().await?;
    Ok(stream)
}

fn member(id: u64) -> Subject {
    Subject::Member { id: id.to_string(), host_names: vec![], addresses: vec![] }
}

fn frame(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

/// A greeting as a member would send it: magic, version, cluster, from, to, purpose.
fn greeting(version: u8, cluster: &str, from: u8, to: u8) -> Vec<u8> {
    let mut body = b"HFR1".to_vec();
    body.push(version);
    body.push(cluster.len() as u8);
    body.extend_from_slice(cluster.as_bytes());
    body.extend_from_slice(&[from, to, 0]);
    frame(&body)
}

/// Everything that the other side says until it closes.
async fn until_closed(stream: &mut TlsStream<TcpStream>) -> Vec<u8> {
    let mut said = Vec::new();
    // How a connection ends, in order or not, is of no interest here; that it ends is.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("it was not closed");
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i14_noise_on_the_raft_port_closes_the_connection_and_nothing_else() {
    let group = Group::of_three().await;
    let seed = 20_261_124;
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..60 {
        let mut stream = connect(&group, 1, group.authority(), member(2)).await.unwrap();
        let greets = rng.random_bool(0.7);
        if greets {
            stream.write_all(&greeting(1, CLUSTER, 2, 1)).await.unwrap();
        }
        for _ in 0..rng.random_range(1..20) {
            let mut body = vec![0_u8; rng.random_range(0..200)];
            rng.fill(&mut body[..]);
            // Half of it in the shape of a question, so that it gets past the outermost number.
            if rng.random_bool(0.5) && !body.is_empty() {
                body[0] = rng.random_range(0..5);
            }
            if stream.write_all(&frame(&body)).await.is_err() {
                break;
            }
        }
        let _ = stream.shutdown().await;
        until_closed(&mut stream).await;
        if round % 20 == 0 {
            group.propose(2, group.write(&format!("round-{round}"))).await;
        }
    }
    for member in group.members.values() {
        member.linearize().await.unwrap();
        assert!(member.status().healthy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i14_a_frame_that_announces_too_much_is_refused_before_it_is_read() {
    let group = Group::of_three().await;
    let mut stream = connect(&group, 1, group.authority(), member(2)).await.unwrap();
    stream.write_all(&greeting(1, CLUSTER, 2, 1)).await.unwrap();
    stream.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    until_closed(&mut stream).await;
    group.propose(1, group.write("after")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn only_members_of_this_cluster_are_heard_and_only_as_themselves() {
    let group = Group::of_three().await;
    let own = group.authority();
    for (what, greeting) in [
        ("another version", greeting(2, CLUSTER, 2, 1)),
        ("another cluster", greeting(1, "01jdother", 2, 1)),
        ("another sender", greeting(1, CLUSTER, 3, 1)),
        ("another target", greeting(1, CLUSTER, 2, 3)),
    ] {
        let mut stream = connect(&group, 1, own, member(2)).await.unwrap();
        stream.write_all(&greeting).await.unwrap();
        let said = until_closed(&mut stream).await;
        assert_eq!(said.get(4), Some(&1), "{what}: the answer is no refusal: {said:?}");
    }
    let stranger = Authority::create(CLUSTER, std::time::SystemTime::now()).unwrap();
    for (what, authority, subject) in [
        ("a node", own, Subject::Node { id: "node_1".into() }),
        ("a member of a cluster with the same name", &stranger, member(2)),
    ] {
        // In TLS 1.3 a client learns that its certificate was refused only when it reads.
        let heard = match connect(&group, 1, authority, subject).await {
            Ok(mut stream) => {
                let _ = stream.write_all(&greeting(1, CLUSTER, 2, 1)).await;
                until_closed(&mut stream).await
            }
            Err(_) => Vec::new(),
        };
        assert!(heard.is_empty(), "{what} was answered: {heard:?}");
    }
}

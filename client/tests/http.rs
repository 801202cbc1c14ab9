//! The HTTP client against real TLS servers on loopback: fail-over, retries, refusals and streams.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, SystemTime};

use holdfast_client::{Client, ClientError, TransportError, exit};
use holdfast_identity::{Authority, Token, TokenKind};
use holdfast_model::Code;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::member::*;

/// What a server saw of a request.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    method: String,
    path: String,
    key: Option<String>,
    authorization: Option<String>,
    body: Vec<u8>,
}

async fn see(request: hyper::Request<hyper::body::Incoming>) -> Seen {
    let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let (method, path) = (request.method().to_string(), request.uri().path_and_query().unwrap().to_string());
    let (key, authorization) = (header("idempotency-key"), header("authorization"));
    let body = request.into_body().collect().await.unwrap().to_bytes().to_vec();
    Seen { method, path, key, authorization, body }
}

/// A member that gives these answers in turn, the last one for ever, and the requests that it saw.
async fn scripted(
    authority: &Authority,
    answers: Vec<fn() -> hyper::Response<Body>>,
) -> (Member, std::sync::Arc<std::sync::Mutex<Vec<Seen>>>) {
    let seen = shared(Vec::new());
    let log = seen.clone();
    let member = Member::start(authority, move |request| {
        let (log, answers) = (log.clone(), answers.clone());
        async move {
            let request = see(request).await;
            let mut log = log.lock().unwrap();
            log.push(request);
            answers[(log.len() - 1).min(answers.len() - 1)]()
        }
    })
    .await;
    (member, seen)
}

#[tokio::test]
async fn goes_on_with_another_member_when_one_is_gone() {
    let authority = authority();
    let (member, seen) = scripted(&authority, vec![|| json(200, r#"{"a":1}"#)]).await;
    let endpoints = vec![dead_endpoint().await, member.endpoint(), dead_endpoint().await];
    let token = Token::generate(TokenKind::Operator).unwrap();
    let client = Client::new(endpoints, authority.certificate(), Some(&token)).unwrap();
    for _ in 0..5 {
        assert_eq!(within(client.get::<Value>("/v1/x?limit=3")).await.unwrap(), json!({"a": 1}));
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 5);
    assert_eq!(seen[0].path, "/v1/x?limit=3");
    assert_eq!(seen[0].authorization.as_deref().unwrap(), format!("Bearer {}", *token.reveal()));
    assert_eq!(seen[0].key, None);
    // I10: the token is in no Debug output.
    assert!(!format!("{client:?}").contains(token.reveal().as_str()));
}

#[tokio::test]
async fn i04_a_retried_mutation_keeps_its_key_and_body() {
    let authority = authority();
    let unavailable: fn() -> _ = || problem(Code::Unavailable);
    let broken: fn() -> _ = || {
        // A head, and then the body breaks: the client cannot know what happened.
        let (chunks, response) = streamed();
        chunks.try_send(Err(std::io::Error::other("cut"))).unwrap();
        response
    };
    let (member, seen) = scripted(
        &authority,
        vec![unavailable, broken, || problem(Code::Timeout), || json(201, r#"{"id":7}"#)],
    )
    .await;
    let client = Client::new(vec![member.endpoint()], authority.certificate(), None).unwrap();
    let answer: Value = within(client.post("/v1/orgs", &json!({"name": "acme"}))).await.unwrap();
    assert_eq!(answer, json!({"id": 7}));
    let seen = seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|request| request == &seen[0]));
    assert_eq!(seen[0].key.as_ref().unwrap().len(), 32);
    assert_eq!(seen[0].body, br#"{"name":"acme"}"#);
}

#[tokio::test]
async fn a_final_refusal_is_told_and_not_retried() {
    let authority = authority();
    let (member, seen) = scripted(&authority, vec![|| problem(Code::QuotaExceeded)]).await;
    let client = Client::new(vec![member.endpoint()], authority.certificate(), None).unwrap();
    let error = within(client.delete::<Value>("/v1/apps/x")).await.unwrap_err();
    let ClientError::Api(api) = &error else { panic!("{error:?}") };
    assert_eq!((api.status, api.code.as_str(), api.request_id.as_str()), (409, "quota_exceeded", "req_test"));
    assert_eq!(api.details["dimension"], "apps");
    assert_eq!(error.exit_code(), exit::CONFLICT);
    assert_eq!(seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn nobody_there_is_a_transient_failure_within_the_deadline() {
    let authority = authority();
    let endpoints = vec![dead_endpoint().await, dead_endpoint().await];
    let client = Client::new(endpoints, authority.certificate(), None).unwrap();
    let client = client.with_deadline(Duration::from_millis(500));
    let error = within(client.get::<Value>("/v1/x")).await.unwrap_err();
    assert!(matches!(
        error,
        ClientError::Unreachable { attempts: 2.., source: TransportError::Connect { .. } }
    ));
    assert_eq!(error.exit_code(), exit::TRANSIENT);
}

#[tokio::test]
async fn a_member_that_never_answers_is_left_for_one_that_does() {
    let authority = authority();
    let stuck = Member::start(&authority, |_| std::future::pending()).await;
    let client = Client::new(vec![stuck.endpoint()], authority.certificate(), None).unwrap();
    let error =
        within(client.with_deadline(Duration::from_millis(300)).get::<Value>("/v1/x")).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable { source: TransportError::Timeout { .. }, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_restarted_member_is_used_again() {
    let authority = authority();
    let answer = |_| async { json(200, "1") };
    let member = Member::start(&authority, answer).await;
    let address = member.address;
    let client = Client::new(vec![member.endpoint()], authority.certificate(), None).unwrap();
    assert_eq!(within(client.get::<u32>("/")).await.unwrap(), 1);
    drop(member);
    tokio::task::yield_now().await;
    let again = async {
        loop {
            // The old listener may take a moment to be gone.
            if tokio::net::TcpStream::connect(address).await.is_err() {
                return Member::start_at(&authority, address, answer).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _member = within(again).await;
    assert_eq!(within(client.get::<u32>("/")).await.unwrap(), 1);
}

#[tokio::test]
async fn another_clusters_server_is_not_believed() {
    let (ours, foreign) = (authority(), Authority::create("othercluster", SystemTime::now()).unwrap());
    let (member, seen) = scripted(&foreign, vec![|| json(200, "1")]).await;
    let client = Client::new(vec![member.endpoint()], ours.certificate(), None).unwrap();
    let error = within(client.with_deadline(Duration::from_millis(300)).get::<u32>("/")).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable { source: TransportError::Tls { .. }, .. }),
        "{error:?}"
    );
    assert_eq!(error.exit_code(), exit::AUTHENTICATION);
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn first_contact_believes_the_pinned_authority_only() {
    let (ours, other) = (authority(), authority());
    let (member, _seen) = scripted(&ours, vec![|| json(200, "1")]).await;
    let pinned = Client::first_contact(vec![member.endpoint()], ours.certificate().fingerprint()).unwrap();
    assert_eq!(within(pinned.get::<u32>("/")).await.unwrap(), 1);
    let wrong = Client::first_contact(vec![member.endpoint()], other.certificate().fingerprint()).unwrap();
    let error = within(wrong.with_deadline(Duration::from_millis(300)).get::<u32>("/")).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable { source: TransportError::Tls { .. }, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_answer_without_a_bound_is_cut_off() {
    let authority = authority();
    let member = Member::start(&authority, |_| async {
        let (chunks, response) = streamed();
        tokio::spawn(async move { while chunks.send(Ok(vec![b' '; 64 << 10])).await.is_ok() {} });
        response
    })
    .await;
    let client = Client::new(vec![member.endpoint()], authority.certificate(), None).unwrap();
    let error = within(client.get::<Value>("/")).await.unwrap_err();
    assert!(matches!(error, ClientError::TooLarge { .. }), "{error:?}");
}

#[tokio::test]
async fn lines_are_whole_values_however_they_are_cut() {
    let authority = authority();
    // A reset overtakes bytes that are still on their way, so the server breaks off only when the client has them.
    let read = std::sync::Arc::new(tokio::sync::Notify::new());
    let all_read = read.clone();
    let member = Member::start(&authority, move |request: hyper::Request<_>| {
        let all_read = all_read.clone();
        async move {
            assert_eq!(request.headers()["accept"], "application/x-ndjson");
            let (chunks, response) = streamed();
            tokio::spawn(async move {
                for chunk in ["{\"n\":", "1}\n\n{\"n\":2}\r\n{\"n\"", ":3}\n{\"n\":4"] {
                    chunks.send(Ok(chunk.into())).await.unwrap();
                }
                if request.uri().path() == "/broken" {
                    all_read.notified().await;
                    chunks.send(Err(std::io::Error::other("cut"))).await.unwrap();
                }
            });
            response
        }
    })
    .await;
    let client = Client::new(vec![member.endpoint()], authority.certificate(), None).unwrap();
    for (path, broken) in [("/whole", false), ("/broken", true)] {
        let mut lines = within(client.lines::<Value>(path)).await.unwrap();
        for n in 1..=3 {
            assert_eq!(within(lines.next()).await.unwrap().unwrap(), json!({"n": n}));
        }
        if broken {
            read.notify_one();
        }
        match within(lines.next()).await {
            Ok(None) => assert!(!broken),
            Err(ClientError::Stream(_)) => assert!(broken),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn every_page_of_a_list_is_read() {
    let authority = authority();
    let pages: Vec<fn() -> _> = vec![
        || json(200, r#"{"revision":4,"items":[1,2],"next":"a/b"}"#),
        || json(200, r#"{"revision":5,"items":[3],"next":"c"}"#),
        || json(200, r#"{"revision":6,"items":[]}"#),
    ];
    let (member, seen) = scripted(&authority, pages).await;
    let client = Client::new(vec![member.endpoint()], authority.certificate(), None).unwrap();
    let all = within(client.all::<u32>("/v1/x?name=y")).await.unwrap();
    assert_eq!((all.revision.0, all.items, all.truncated), (4, vec![1, 2, 3], false));
    let paths: Vec<_> = seen.lock().unwrap().iter().map(|request| request.path.clone()).collect();
    assert_eq!(
        paths,
        ["/v1/x?name=y&limit=200", "/v1/x?name=y&limit=200&cursor=a%2Fb", "/v1/x?name=y&limit=200&cursor=c"]
    );
}

//! Every rpc of the descriptor set, on both listeners, by callers who prove nothing.

use std::time::Duration;

use latchkey_harness::{Stage, StageOptions};
use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

use crate::support::options;

/// What carries its proof in the request itself.
const OPEN: [&str; 3] = [
    "/latchkey.v1.AccountService/Bootstrap",
    "/latchkey.v1.SessionService/SignIn",
    "/latchkey.v1.RunnerService/Enroll",
];

fn every_rpc() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(latchkey_proto::DESCRIPTOR_SET).unwrap();
    let services = set
        .file
        .iter()
        .flat_map(|file| file.service.iter().map(move |service| (file.package(), service)));
    services
        .flat_map(|(package, service)| {
            service
                .method
                .iter()
                .map(move |method| format!("/{package}.{}/{}", service.name(), method.name()))
        })
        .filter(|path| path.starts_with("/latchkey."))
        .collect()
}

async fn channel(stage: &Stage, url: String) -> Channel {
    let ca = Certificate::from_pem(stage.plane.ca_pem().unwrap());
    Endpoint::from_shared(url)
        .unwrap()
        .timeout(Duration::from_secs(20))
        .tls_config(ClientTlsConfig::new().ca_certificate(ca))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

/// Calls any rpc with an empty message; for streams it is the first.
async fn call(channel: &Channel, path: &str, tokens: &[&str]) -> Code {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let mut request = Request::new(());
    for token in tokens {
        let value = MetadataValue::try_from(format!("Bearer {token}")).unwrap();
        request.metadata_mut().append("authorization", value);
    }
    let path = PathAndQuery::try_from(path).unwrap();
    let codec = ProstCodec::<(), ()>::default();
    match client.unary(request, path, codec).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn nothing_is_answered_to_who_proves_nothing() {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    let people = channel(&stage, stage.plane.people_url()).await;
    let runners = channel(&stage, stage.plane.runners_url()).await;
    let owner = stage.owner.token();
    let rpcs = every_rpc();
    assert!(rpcs.len() > 30, "{rpcs:?}");
    for path in &rpcs {
        let for_runners = path.contains("RunnerService");
        let (home, away) = if for_runners { (&runners, &people) } else { (&people, &runners) };
        if !OPEN.contains(&path.as_str()) {
            for tokens in [&[][..], &["lk_unknown"], &[owner, owner]] {
                assert_eq!(call(home, path, tokens).await, Code::Unauthenticated, "{path}");
            }
        }
        // A person's token opens nothing for runners, and nobody's rpc exists on the other side.
        assert_eq!(call(away, path, &[owner]).await, Code::Unauthenticated, "{path}");
        if for_runners && !OPEN.contains(&path.as_str()) {
            assert_eq!(call(home, path, &[owner]).await, Code::Unauthenticated, "{path}");
        }
    }
    // Known callers do get through to the services.
    assert_eq!(call(&people, "/latchkey.v1.AccountService/WhoAmI", &[owner]).await, Code::Ok);
    let health = "/grpc.health.v1.Health/Check";
    assert_eq!(call(&people, health, &[]).await, Code::Ok);
    assert_eq!(call(&runners, health, &[]).await, Code::Unauthenticated);
}

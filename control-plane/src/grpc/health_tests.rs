use std::time::Duration;

use latchkey_domain::policy::MfaPolicy;
use tokio::net::TcpListener;
use tonic::transport::Endpoint;
use tonic::transport::server::TcpIncoming;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::app::fixture::Fixture;

#[tokio::test]
async fn an_old_copy_is_not_ready_for_runners_and_stays_alive() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let routes = super::people(fixture.app.clone()).await;
    let serving = super::server().add_routes(routes);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let runners = HealthCheckRequest { service: "latchkey.v1.RunnerService".into() };
    let mut watched = health.watch(runners).await.unwrap().into_inner();
    let first = watched.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    let later = fixture.told_later().await;
    fixture.app.greet(&fixture.runner().await, Some(&later)).await.unwrap_err();
    let next = tokio::time::timeout(Duration::from_secs(10), watched.message()).await;
    assert_eq!(next.unwrap().unwrap().unwrap().status(), ServingStatus::NotServing);
    let whole = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(whole.status(), ServingStatus::Serving);
    fixture.app.clear_alarm().await.unwrap();
    let next = tokio::time::timeout(Duration::from_secs(10), watched.message()).await;
    assert_eq!(next.unwrap().unwrap().unwrap().status(), ServingStatus::Serving);
}

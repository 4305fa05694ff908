//! The connection to the control plane: address, TLS, the bearer token, and when a call is worth
//! repeating.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use tokio::time::{Instant, sleep};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Uri};
use tonic::{Request, Response, Status};

use latchkey_proto::v1::account_service_client::AccountServiceClient;
use latchkey_proto::v1::audit_service_client::AuditServiceClient;
use latchkey_proto::v1::environment_service_client::EnvironmentServiceClient;
use latchkey_proto::v1::member_service_client::MemberServiceClient;
use latchkey_proto::v1::notice_service_client::NoticeServiceClient;
use latchkey_proto::v1::organization_service_client::OrganizationServiceClient;
use latchkey_proto::v1::pool_service_client::PoolServiceClient;
use latchkey_proto::v1::quarantine_service_client::QuarantineServiceClient;
use latchkey_proto::v1::run_service_client::RunServiceClient;
use latchkey_proto::v1::session_service_client::SessionServiceClient;
use latchkey_proto::v1::state_service_client::StateServiceClient;
use latchkey_proto::v1::variable_service_client::VariableServiceClient;

use crate::failure::{Failure, is_worth_repeating};

/// A run carries up to 1,000 changes.
const LARGEST_ANSWER: usize = 64 << 20;

pub(crate) type Authorized = InterceptedService<Channel, Bearer>;

/// Whom to talk to, and whom to trust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) address: String,
    pub(crate) ca_pem: Option<String>,
    pub(crate) insecure_plaintext: bool,
}

/// How long a call is repeated while the connection is broken.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    /// For a command: a moment.
    Short,
    /// For somebody who follows a run: as long as a restart may take.
    Long,
}

impl Patience {
    fn limit(self) -> Duration {
        match self {
            Patience::Short => Duration::from_secs(2),
            Patience::Long => Duration::from_secs(120),
        }
    }
}

#[derive(Clone)]
pub(crate) struct Client {
    address: String,
    channel: Channel,
    bearer: Bearer,
}

macro_rules! services {
    ($($method:ident: $client:ident),* $(,)?) => {$(
        pub(crate) fn $method(&self) -> $client<Authorized> {
            $client::with_interceptor(self.channel.clone(), self.bearer.clone())
                .max_decoding_message_size(LARGEST_ANSWER)
        }
    )*};
}

impl Client {
    /// Prepares a connection; it is made by the first call and made again whenever it breaks.
    pub(crate) fn new(target: &Target, token: Option<&SecretString>) -> Result<Client, Failure> {
        let uri = parse_address(&target.address, target.insecure_plaintext)?;
        let mut endpoint = Endpoint::from(uri)
            .connect_timeout(Duration::from_secs(10))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20))
            .tcp_nodelay(true);
        if target.address.starts_with("https://") {
            let tls = match &target.ca_pem {
                Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
                None => ClientTlsConfig::new().with_native_roots(),
            };
            endpoint = endpoint.tls_config(tls).map_err(|error| {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                usage(&format!(
                    "the CA certificates cannot be used: {}",
                    cause.unwrap_or_else(|| error.to_string())
                ))
            })?;
        }
        Ok(Client {
            address: target.address.clone(),
            channel: endpoint.connect_lazy(),
            bearer: Bearer::new(token)?,
        })
    }

    services! {
        accounts: AccountServiceClient,
        audit: AuditServiceClient,
        environments: EnvironmentServiceClient,
        members: MemberServiceClient,
        notices: NoticeServiceClient,
        organizations: OrganizationServiceClient,
        pools: PoolServiceClient,
        quarantine: QuarantineServiceClient,
        runs: RunServiceClient,
        sessions: SessionServiceClient,
        states: StateServiceClient,
        variables: VariableServiceClient,
    }

    /// Calls something whose repeat is safe; repeats it while the connection is broken.
    pub(crate) async fn call<T, F, Fut>(&self, call: F) -> Result<T, Failure>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_with(Patience::Short, call).await
    }

    pub(crate) async fn call_with<T, F, Fut>(
        &self,
        patience: Patience,
        mut call: F,
    ) -> Result<T, Failure>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let start = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            match call().await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => {
                    let wait = backoff.next();
                    let in_time = start.elapsed() + wait < patience.limit();
                    if !in_time || !is_worth_repeating(&status) {
                        return Err(self.failure(&status));
                    }
                    sleep(wait).await;
                }
            }
        }
    }

    /// Takes the answer of a call that must not be repeated.
    pub(crate) fn once<T>(&self, answer: Result<Response<T>, Status>) -> Result<T, Failure> {
        answer.map(Response::into_inner).map_err(|status| self.failure(&status))
    }

    pub(crate) fn failure(&self, status: &Status) -> Failure {
        Failure::of_status(&self.address, status)
    }
}

/// Adds the token to every request, marked so that nothing prints it.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: Option<&SecretString>) -> Result<Bearer, Failure> {
        let Some(token) = token else { return Ok(Bearer(None)) };
        let mut value = MetadataValue::try_from(format!("Bearer {}", token.expose_secret()))
            .map_err(|_| usage("the token has characters that no token has"))?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer([hidden])")
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Doubles the wait up to three seconds, each shortened by chance so that many do not come back
/// at once.
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Backoff {
        Backoff(Duration::from_millis(50))
    }

    pub(crate) fn next(&mut self) -> Duration {
        self.0 = (self.0 * 2).min(Duration::from_secs(3));
        let chance = u32::from(uuid::Uuid::new_v4().as_bytes()[0]);
        self.0 / 2 + self.0 / 2 * chance / 255
    }
}

/// Writes the address in full: a missing scheme means TLS.
pub(crate) fn full_address(address: &str) -> String {
    let address = address.trim_end_matches('/');
    if address.contains("://") { address.to_owned() } else { format!("https://{address}") }
}

fn parse_address(address: &str, insecure_plaintext: bool) -> Result<Uri, Failure> {
    let uri: Uri = address.parse().map_err(|_| usage(&format!("`{address}` is not an address")))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let bare = uri.path().trim_matches('/').is_empty()
        && uri.query().is_none()
        && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if host.is_empty() || !bare {
        return Err(usage(&format!("`{address}` is not an address")));
    }
    let loopback =
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match uri.scheme_str() {
        Some("https") => Ok(uri),
        Some("http") if insecure_plaintext && loopback => Ok(uri),
        Some("http") => Err(Failure::Usage {
            message: format!("{address} would send the token in plain text"),
            hint: "use https://, or for a loopback address --insecure-plaintext".into(),
        }),
        Some(_) | None => Err(usage(&format!("`{address}` begins with neither https nor http"))),
    }
}

fn usage(message: &str) -> Failure {
    Failure::Usage {
        message: message.to_owned(),
        hint: "an address looks like https://latchkey.example.com:7400".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_for_loopback_and_by_flag_only() {
        #[track_caller]
        fn check(address: &str, insecure: bool, expect: bool) {
            assert_eq!(parse_address(address, insecure).is_ok(), expect, "{address}");
        }
        check("https://latchkey.example.com:7400", false, true);
        check("http://127.0.0.1:1", true, true);
        check("http://[::1]:1", true, true);
        check("http://localhost:1", true, true);
        check("http://127.0.0.1:1", false, false);
        check("http://example.com", true, false);
        check("ftp://example.com", true, false);
        check("https://user@example.com", false, false);
        check("https://example.com/path", false, false);
        check("", false, false);
    }

    #[test]
    fn a_missing_scheme_means_tls() {
        assert_eq!(full_address("example.com:7400/"), "https://example.com:7400");
        assert_eq!(full_address("http://localhost:1"), "http://localhost:1");
    }

    #[test]
    fn the_wait_grows_and_stays_bounded() {
        let mut backoff = Backoff::new();
        for _ in 0..20 {
            assert!(backoff.next() <= Duration::from_secs(3));
        }
        assert!(backoff.next() >= Duration::from_millis(1500));
    }
}

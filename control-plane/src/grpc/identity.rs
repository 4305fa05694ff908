//! The layers that prove who is calling, before a service sees anything. What has no rule is
//! refused; what a rule does not open needs its proof.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use latchkey_proto::v1::Reason;
use secrecy::SecretString;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::PART_TIMEOUT;
use super::places::{Kind, Places};
use crate::app::App;
use crate::auth::rules::{Rule, rule_for};
use crate::auth::{Proof, RunnerIdentity};
use crate::authority::key_of;
use crate::error::{Error, Result};
use crate::listener::Peer;

/// What anybody may ask of the people's listener without a proof.
const OPEN: &[&str] = &["/grpc.health.v1.Health/", "/grpc.reflection.v1.ServerReflection/"];

/// How many calls of a listener may be in progress whose only proof is a secret in the request:
/// anybody can send half of one.
const MOST_WITH_SECRET: usize = 64;

/// How long such a call may take. It is one small message.
const WITH_SECRET: Duration = Duration::from_secs(10);

/// Proves people and programs by their token.
#[derive(Clone, Debug)]
pub struct PeopleLayer {
    pub app: Arc<App>,
}

/// Proves runners by their client certificate, and gives each stream its place.
#[derive(Clone, Debug)]
pub struct RunnersLayer {
    app: Arc<App>,
    places: Places,
    patience: Duration,
}

impl RunnersLayer {
    /// `patience` is how long a stream of bulk data may bring no whole message.
    pub fn new(app: Arc<App>, patience: Duration) -> Self {
        Self { app, places: Places::default(), patience }
    }
}

impl<S> Layer<S> for PeopleLayer {
    type Service = Proved<S>;

    fn layer(&self, inner: S) -> Proved<S> {
        Proved::new(inner, Arc::clone(&self.app), Listener::People)
    }
}

impl<S> Layer<S> for RunnersLayer {
    type Service = Proved<S>;

    fn layer(&self, inner: S) -> Proved<S> {
        let Self { app, places, patience } = self.clone();
        Proved::new(inner, app, Listener::Runners { places, patience })
    }
}

#[derive(Clone, Debug)]
enum Listener {
    People,
    Runners { places: Places, patience: Duration },
}

/// How long a request may take until it is answered.
#[derive(Debug)]
enum Allowed {
    /// Its parts are waited for one by one.
    Parts,
    /// It is one message, of which half may never come; and its place, if it has one here.
    Whole(Duration, Option<OwnedSemaphorePermit>),
}

/// A service behind the proof.
#[derive(Clone, Debug)]
pub struct Proved<S> {
    inner: S,
    app: Arc<App>,
    listener: Listener,
    with_secret: Arc<Semaphore>,
}

impl<S> Proved<S> {
    fn new(inner: S, app: Arc<App>, listener: Listener) -> Self {
        Self { inner, app, listener, with_secret: Arc::new(Semaphore::new(MOST_WITH_SECRET)) }
    }
}

impl<S> Service<Request<Body>> for Proved<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The clone that was polled ready is the one that is called.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let (app, listener) = (Arc::clone(&self.app), self.listener.clone());
        let with_secret = Arc::clone(&self.with_secret);
        Box::pin(async move {
            let proved = match listener {
                Listener::People => prove_caller(&app, &mut request, with_secret).await,
                Listener::Runners { places, patience } => {
                    prove_runner(&app, &mut request, with_secret, &places, patience).await
                }
            };
            match proved {
                Ok(Allowed::Parts) => inner.call(request).await,
                Ok(Allowed::Whole(time, _place)) => {
                    let answer = tokio::time::timeout(time, inner.call(request)).await;
                    answer.unwrap_or_else(|_| {
                        let message = "the request was not answered in time; send it again";
                        Ok(Status::deadline_exceeded(message).into_http())
                    })
                }
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

/// Gives a call its place before a byte of its body is read, or refuses it with a code alone:
/// this is soon over.
fn with_secret(places: Arc<Semaphore>) -> Result<Allowed, Status> {
    let place = places.try_acquire_owned().map_err(|_| {
        Status::resource_exhausted("too many such calls are in progress; try again")
    })?;
    Ok(Allowed::Whole(WITH_SECRET, Some(place)))
}

async fn prove_caller(
    app: &App,
    request: &mut Request<Body>,
    secrets: Arc<Semaphore>,
) -> Result<Allowed, Status> {
    let path = request.uri().path();
    if OPEN.iter().any(|open| path.starts_with(open)) {
        return Ok(Allowed::Parts);
    }
    match rule_for(path) {
        Some(Rule::SecretInRequest) if !path.contains("RunnerService") => with_secret(secrets),
        Some(Rule::Anyone | Rule::Within(_)) => {
            let token = bearer(request)?;
            let proof: Proof = app.prove(&token).await?;
            request.extensions_mut().insert(proof);
            Ok(Allowed::Parts)
        }
        // Told alike, so that nobody learns what else exists.
        Some(Rule::SecretInRequest | Rule::Runner) | None => Err(identity_required().into()),
    }
}

async fn prove_runner(
    app: &App,
    request: &mut Request<Body>,
    secrets: Arc<Semaphore>,
    places: &Places,
    patience: Duration,
) -> Result<Allowed, Status> {
    let path = request.uri().path();
    match rule_for(path) {
        Some(Rule::SecretInRequest) if path.contains("RunnerService") => with_secret(secrets),
        Some(Rule::Runner) => {
            let (kind, allowed) = match path.rsplit('/').next() {
                Some("Lease") => (Kind::Lease, Allowed::Parts),
                Some("FetchArtifact") => (Kind::Bulk, Allowed::Whole(PART_TIMEOUT, None)),
                Some(_) | None => (Kind::Bulk, Allowed::Parts),
            };
            let peer = request.extensions().get::<Peer>();
            let leaf = peer.and_then(|peer| peer.certificate.as_ref());
            let key = key_of(leaf.ok_or_else(identity_required)?)?;
            let runner: RunnerIdentity = app.runner_with_key(&key).await?;
            let place = places.take(app, runner.id, kind, patience).await?;
            let extensions = request.extensions_mut();
            extensions.insert(runner);
            extensions.insert(place);
            Ok(allowed)
        }
        Some(Rule::SecretInRequest | Rule::Anyone | Rule::Within(_)) | None => {
            Err(identity_required().into())
        }
    }
}

fn bearer(request: &Request<Body>) -> Result<SecretString> {
    let mut values = request.headers().get_all(http::header::AUTHORIZATION).iter();
    // More than one is somebody's trick.
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(identity_required());
    };
    let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    token.map(SecretString::from).ok_or_else(identity_required)
}

fn identity_required() -> Error {
    Error::refused(Reason::IdentityRequired, "sign in first: this needs a proof of who is calling")
}

#[cfg(test)]
mod tests {
    use latchkey_domain::policy::MfaPolicy;
    use tonic::Code;

    use super::*;
    use crate::app::fixture::Fixture;

    /// Asks a listener 65 times what needs a secret alone; nothing behind the layer answers.
    async fn codes<L>(layer: L, path: &str) -> Vec<Code>
    where
        L: Layer<Silent, Service = Proved<Silent>>,
    {
        let mut proved = layer.layer(Silent);
        let call = |_| {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            tokio::spawn(proved.call(request))
        };
        let calls: Vec<_> = (0..=MOST_WITH_SECRET).map(call).collect();
        let before = tokio::time::Instant::now();
        let mut codes = vec![];
        for call in calls {
            let answer = call.await.unwrap().unwrap();
            codes.push(Status::from_header_map(answer.headers()).unwrap().code());
        }
        assert!(before.elapsed() < WITH_SECRET * 2);
        codes
    }

    #[derive(Clone)]
    struct Silent;

    impl Service<Request<Body>> for Silent {
        type Response = Response<Body>;
        type Error = std::convert::Infallible;
        type Future = std::future::Pending<Result<Response<Body>, Self::Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test]
    async fn calls_with_a_secret_alone_are_few_at_a_time_and_soon_over() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let app = || Arc::clone(&fixture.app);
        tokio::time::pause();
        let mut expected = vec![Code::DeadlineExceeded; MOST_WITH_SECRET];
        expected.push(Code::ResourceExhausted);
        let people = codes(PeopleLayer { app: app() }, "/latchkey.v1.AccountService/Bootstrap");
        assert_eq!(people.await, expected);
        let runners = RunnersLayer::new(app(), PART_TIMEOUT);
        assert_eq!(codes(runners, "/latchkey.v1.RunnerService/Enroll").await, expected);
    }
}

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
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::PART_TIMEOUT;
use super::places::{Kind, Places};
use crate::app::App;
use crate::auth::rules::{Rule, rule_for};
use crate::auth::{Caller, RunnerIdentity};
use crate::authority::key_of;
use crate::error::{Error, Result};
use crate::listener::Peer;

/// What anybody may ask of the people's listener without a proof.
const OPEN: &[&str] = &["/grpc.health.v1.Health/", "/grpc.reflection.v1.ServerReflection/"];

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
        Proved { inner, app: Arc::clone(&self.app), listener: Listener::People }
    }
}

impl<S> Layer<S> for RunnersLayer {
    type Service = Proved<S>;

    fn layer(&self, inner: S) -> Proved<S> {
        let Self { app, places, patience } = self.clone();
        Proved { inner, app, listener: Listener::Runners { places, patience } }
    }
}

#[derive(Clone, Debug)]
enum Listener {
    People,
    Runners { places: Places, patience: Duration },
}

/// How long a request may take until it is answered.
#[derive(Clone, Copy, Debug)]
enum Allowed {
    /// Its parts are waited for one by one.
    Parts,
    /// It is one message, of which half may never come.
    Whole(Duration),
}

/// A service behind the proof.
#[derive(Clone, Debug)]
pub struct Proved<S> {
    inner: S,
    app: Arc<App>,
    listener: Listener,
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
        Box::pin(async move {
            let proved = match listener {
                Listener::People => prove_caller(&app, &mut request).await,
                Listener::Runners { places, patience } => {
                    prove_runner(&app, &mut request, &places, patience).await
                }
            };
            match proved {
                Ok(Allowed::Parts) => inner.call(request).await,
                Ok(Allowed::Whole(time)) => {
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

async fn prove_caller(app: &App, request: &mut Request<Body>) -> Result<Allowed, Status> {
    let path = request.uri().path();
    if OPEN.iter().any(|open| path.starts_with(open)) {
        return Ok(Allowed::Parts);
    }
    match rule_for(path) {
        Some(Rule::SecretInRequest) if !path.contains("RunnerService") => {
            Ok(Allowed::Whole(PART_TIMEOUT))
        }
        Some(Rule::Anyone | Rule::Within(_)) => {
            let token = bearer(request)?;
            let caller: Caller = app.caller(&token).await?;
            request.extensions_mut().insert(caller);
            Ok(Allowed::Parts)
        }
        // Told alike, so that nobody learns what else exists.
        Some(Rule::SecretInRequest | Rule::Runner) | None => Err(identity_required().into()),
    }
}

async fn prove_runner(
    app: &App,
    request: &mut Request<Body>,
    places: &Places,
    patience: Duration,
) -> Result<Allowed, Status> {
    let path = request.uri().path();
    match rule_for(path) {
        Some(Rule::SecretInRequest) if path.contains("RunnerService") => {
            Ok(Allowed::Whole(PART_TIMEOUT))
        }
        Some(Rule::Runner) => {
            let (kind, allowed) = match path.rsplit('/').next() {
                Some("Lease") => (Kind::Lease, Allowed::Parts),
                Some("FetchArtifact") => (Kind::Bulk, Allowed::Whole(PART_TIMEOUT)),
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

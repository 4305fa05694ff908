//! The layers that prove who is calling, before a service sees anything. What has no rule is
//! refused; what a rule does not open needs its proof.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use latchkey_proto::v1::Reason;
use secrecy::SecretString;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tower::{Layer, Service};

use crate::app::App;
use crate::auth::rules::{Rule, rule_for};
use crate::auth::{Proof, RunnerIdentity};
use crate::authority::key_of;
use crate::error::{Error, Result};

/// What anybody may ask of the people's listener without a proof.
const OPEN: &[&str] = &["/grpc.health.v1.Health/", "/grpc.reflection.v1.ServerReflection/"];

/// Proves people and programs by their token.
#[derive(Clone, Debug)]
pub struct PeopleLayer {
    pub app: Arc<App>,
}

/// Proves runners by their client certificate.
#[derive(Clone, Debug)]
pub struct RunnersLayer {
    pub app: Arc<App>,
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
        Proved { inner, app: Arc::clone(&self.app), listener: Listener::Runners }
    }
}

#[derive(Clone, Copy, Debug)]
enum Listener {
    People,
    Runners,
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
        let (app, listener) = (Arc::clone(&self.app), self.listener);
        Box::pin(async move {
            let proved = match listener {
                Listener::People => prove_caller(&app, &mut request).await,
                Listener::Runners => prove_runner(&app, &mut request).await,
            };
            match proved {
                Ok(()) => inner.call(request).await,
                Err(error) => Ok(Status::from(error).into_http()),
            }
        })
    }
}

async fn prove_caller(app: &App, request: &mut Request<Body>) -> Result<()> {
    let path = request.uri().path();
    if OPEN.iter().any(|open| path.starts_with(open)) {
        return Ok(());
    }
    match rule_for(path) {
        Some(Rule::SecretInRequest) if !path.contains("RunnerService") => Ok(()),
        Some(Rule::Anyone | Rule::Within(_)) => {
            let token = bearer(request)?;
            let proof: Proof = app.prove(&token).await?;
            request.extensions_mut().insert(proof);
            Ok(())
        }
        // Told alike, so that nobody learns what else exists.
        Some(Rule::SecretInRequest | Rule::Runner) | None => Err(identity_required()),
    }
}

async fn prove_runner(app: &App, request: &mut Request<Body>) -> Result<()> {
    let path = request.uri().path();
    match rule_for(path) {
        Some(Rule::SecretInRequest) if path.contains("RunnerService") => Ok(()),
        Some(Rule::Runner) => {
            let certificates = request
                .extensions()
                .get::<TlsConnectInfo<TcpConnectInfo>>()
                .and_then(TlsConnectInfo::peer_certs);
            let leaf = certificates.as_deref().and_then(|chain| chain.first());
            let key = key_of(leaf.ok_or_else(identity_required)?)?;
            let runner: RunnerIdentity = app.runner_with_key(&key).await?;
            request.extensions_mut().insert(runner);
            Ok(())
        }
        Some(Rule::SecretInRequest | Rule::Anyone | Rule::Within(_)) | None => {
            Err(identity_required())
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

//! Plain HTTP on the people's listener, beside gRPC on the same port: terraform's `http` backend
//! for workstations, under `/state/ORGANIZATION/ENVIRONMENT`.
//!
//! A layer in front of the gRPC layers takes what is under that path, and proves the caller by a
//! password in place of a bearer token. Transport, bounds and use cases are those of gRPC.

mod proof;
mod state;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::app::App;

/// Serves states, and leaves all else to what is behind it.
#[derive(Clone, Debug)]
pub struct StateLayer {
    pub app: Arc<App>,
}

impl<S> Layer<S> for StateLayer {
    type Service = WithStates<S>;

    fn layer(&self, inner: S) -> WithStates<S> {
        WithStates { inner, app: Arc::clone(&self.app) }
    }
}

/// A service behind the states.
#[derive(Clone, Debug)]
pub struct WithStates<S> {
    inner: S,
    app: Arc<App>,
}

impl<S> Service<Request<Body>> for WithStates<S>
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

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path().starts_with(state::PREFIX) {
            let app = Arc::clone(&self.app);
            return Box::pin(async move { Ok(state::answer(&app, request).await) });
        }
        Box::pin(self.inner.call(request))
    }
}

//! gRPC over turmoil's TCP.
//!
//! In production a runner is proved by its client certificate; here there is no TLS, and the key
//! that the certificate would carry is the host of the request's authority. [`IdentityLayer`]
//! does with it what the control plane's own layer does: it asks `runner_with_key` and puts the
//! answer into the request's extensions.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper_util::rt::TokioIo;
use latchkey_control_plane::app::App;
use latchkey_domain::id::Digest;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};
use tower::{Layer, Service};
use turmoil::net::{TcpListener, TcpStream};

pub(crate) const PLANE: &str = "plane";
pub(crate) const PEOPLE_PORT: u16 = 1;
pub(crate) const RUNNERS_PORT: u16 = 2;

/// Those of the agent, shortened as the leases are.
const KEEPALIVE: Duration = Duration::from_secs(2);
const CONNECT: Duration = Duration::from_secs(1);

/// A connection that was accepted.
#[derive(Debug)]
pub(crate) struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// Listens on a port of the host that this is called on.
pub(crate) async fn listen(port: u16) -> io::Result<ReceiverStream<io::Result<Accepted>>> {
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    let (sender, accepted) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let stream = listener.accept().await.map(|(stream, _)| Accepted(stream));
            if sender.send(stream).await.is_err() {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(accepted))
}

/// Answers a channel to the control plane that dials when it is used, and again when it broke.
pub(crate) fn channel(authority: &str, port: u16) -> Channel {
    let origin = format!("http://{authority}").parse().expect("our authorities are host names");
    Endpoint::from_static("http://plane")
        .origin(origin)
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(tower::service_fn(move |_| async move {
            TcpStream::connect((PLANE, port)).await.map(TokioIo::new)
        }))
}

/// Stands where mTLS proves a runner.
#[derive(Clone, Debug)]
pub(crate) struct IdentityLayer {
    pub(crate) app: Arc<App>,
}

impl<S> Layer<S> for IdentityLayer {
    type Service = Identified<S>;

    fn layer(&self, inner: S) -> Identified<S> {
        Identified { inner, app: Arc::clone(&self.app) }
    }
}

/// A service that knows which runner calls.
#[derive(Clone, Debug)]
pub(crate) struct Identified<S> {
    inner: S,
    app: Arc<App>,
}

impl<S> Service<Request<Body>> for Identified<S>
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
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let app = Arc::clone(&self.app);
        Box::pin(async move {
            let key = request.uri().host().and_then(|host| host.parse::<Digest>().ok());
            let Some(key) = key else {
                return Ok(Status::unauthenticated("no key").into_http());
            };
            match app.runner_with_key(&key).await {
                Ok(runner) => {
                    request.extensions_mut().insert(runner);
                    inner.call(request).await
                }
                Err(error) => Ok(Status::from(error).into_http()),
            }
        })
    }
}

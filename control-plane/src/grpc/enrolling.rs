//! The runners' service with a bound of its own for `Enroll`, which anybody may call: of what
//! strangers send, less is kept until the rest of it comes.

use std::sync::Arc;
use std::task::{Context, Poll};

use latchkey_proto::v1::runner_service_server::RunnerServiceServer;
use tonic::body::Body;
use tonic::server::NamedService;

use super::{LARGEST_MESSAGE, LARGEST_OF_RUNNERS, LARGEST_WITH_SECRET, Service};
use crate::app::App;

type Server = RunnerServiceServer<Service>;

#[derive(Clone, Debug)]
pub(super) struct Runners {
    enrolling: Server,
    enrolled: Server,
}

impl Runners {
    pub(super) fn new(app: Arc<App>) -> Self {
        let service = Arc::new(Service { app });
        let limited = |largest| {
            Server::from_arc(Arc::clone(&service))
                .max_decoding_message_size(largest)
                .max_encoding_message_size(LARGEST_MESSAGE)
        };
        Self { enrolling: limited(LARGEST_WITH_SECRET), enrolled: limited(LARGEST_OF_RUNNERS) }
    }
}

impl NamedService for Runners {
    const NAME: &'static str = Server::NAME;
}

impl tower::Service<http::Request<Body>> for Runners {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = <Server as tower::Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_enroll = request.uri().path().rsplit('/').next() == Some("Enroll");
        let server = if is_enroll { &mut self.enrolling } else { &mut self.enrolled };
        server.call(request)
    }
}

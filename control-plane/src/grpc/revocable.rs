//! Streams that end the moment their runner is revoked or their caller's right ends, whatever
//! waits in them.

use std::future::Future;

use latchkey_proto::v1::Reason;
use tokio_stream::Stream;
use tonic::Status;

use super::Answers;
use crate::app::open_streams::{Lost, Until};
use crate::auth::revocation::Revocation;
use crate::error::Error;

/// Says why a stream ends.
pub(super) fn revoked() -> Status {
    Error::refused(Reason::IdentityRequired, "the runner was revoked").into()
}

/// Does something for a runner, unless it is revoked first.
pub(super) async fn unless_revoked<T>(
    revocation: Revocation,
    doing: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    tokio::select! {
        biased;
        () = revocation.revoked() => Err(revoked()),
        done = doing => done,
    }
}

/// Ends what a runner is sent: nothing that waits behind the revocation is sent any more.
pub(super) fn until_revoked<T, S>(revocation: Revocation, inner: S) -> Answers<T>
where
    T: 'static,
    S: Stream<Item = Result<T, Status>> + Send + Unpin + 'static,
{
    let over = Box::pin(async move {
        revocation.revoked().await;
        revoked()
    });
    Box::pin(Until::new(over, inner))
}

/// Ends what a person or program is sent when their right to it ends.
pub(super) fn until_lost<T, S>(lost: Lost, inner: S) -> Answers<T>
where
    T: 'static,
    S: Stream<Item = Result<T, Status>> + Send + Unpin + 'static,
{
    let over = Box::pin(async move { lost.await.into() });
    Box::pin(Until::new(over, inner))
}

#[cfg(test)]
mod tests {
    use latchkey_domain::id::RunnerId;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::auth::revocation::Revocations;

    #[tokio::test]
    async fn what_waits_behind_a_revocation_is_not_sent() {
        let revocations = Revocations::default();
        let runner = RunnerId::from_bytes([1; 16]);
        let waiting = tokio_stream::iter((0..3).map(Ok));
        let mut stream = until_revoked(revocations.of(runner), waiting);
        assert_eq!(stream.next().await.unwrap().unwrap(), 0);
        revocations.revoke(runner);
        let code = stream.next().await.unwrap().unwrap_err().code();
        assert_eq!(code, tonic::Code::Unauthenticated);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_silent_stream_ends_too() {
        let revocations = Revocations::default();
        let runner = RunnerId::from_bytes([1; 16]);
        let silent = tokio_stream::pending::<Result<(), Status>>();
        let mut stream = until_revoked(revocations.of(runner), silent);
        let (ended, ()) = tokio::join!(stream.next(), async { revocations.revoke(runner) });
        assert!(ended.unwrap().is_err());
    }
}

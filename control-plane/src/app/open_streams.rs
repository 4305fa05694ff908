//! What an open stream stands on: the right to it may end while it is open.
//!
//! A call is looked at when it comes in; a stream may outlive that by days. So each asks again
//! when something changes that its right depends on, in whichever process that was: the
//! membership or the service token's scope, and the token that it was opened with. It is told
//! before what waits in the stream is sent.
//!
//! Nor does a stream outlive its reader's attention: one that has stopped keeps no file open.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use latchkey_domain::id::RunId;
use latchkey_proto::v1::Reason;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

use super::App;
use crate::auth::{Caller, Proof, Right};
use crate::blobs::BlobReader;
use crate::error::{Error, Result};
use crate::store::{Seen, keys};

/// What a stream is about.
#[derive(Clone, Debug)]
pub enum Ground {
    /// The right to read a run.
    Run(RunId),
    /// The right to upload to and queue in an environment.
    Environment { organization: String, environment: String },
    /// The right to read and write an environment's state.
    State { organization: String, environment: String },
    /// Owning an organization.
    Organization(String),
}

/// Resolves when the right has ended, with what the stream ends by.
pub type Lost = Pin<Box<dyn Future<Output = Error> + Send>>;

/// How long a reader of a blob may stop.
const PATIENCE: Duration = Duration::from_secs(60);

impl App {
    /// Checks a caller's right to a stream, and watches it from now on.
    pub async fn hold(self: &Arc<Self>, proof: &Proof, ground: Ground) -> Result<Lost> {
        let organization = match &ground {
            Ground::Run(run) => {
                let (standing, _) = self.run_for(&proof.caller, *run, Right::Read).await?;
                standing.organization
            }
            Ground::Environment { organization, .. } | Ground::State { organization, .. } => {
                self.member(&proof.caller, organization).await?.organization
            }
            Ground::Organization(name) => self.owner(&proof.caller, name).await?.organization,
        };
        let position = match &proof.caller {
            Caller::User { id, .. } => keys::membership(organization, *id),
            Caller::Service { id, .. } => keys::service_token(organization, *id),
        };
        let token = keys::token(proof.token.as_bytes());
        let mut changes = self.store.watch(keys::exactly(&position)).and(keys::exactly(&token));
        // Only now is nothing missed any more.
        self.still_holds(proof, &ground).await?;
        let (app, proof) = (Arc::clone(self), proof.clone());
        Ok(Box::pin(async move {
            loop {
                tokio::select! {
                    seen = changes.next() => match seen {
                        Seen::Change(_) | Seen::Lagged => {}
                        Seen::Closed => {
                            let message = "the control plane stops; come back in a moment";
                            return Error::refused(Reason::StoreUnavailable, message);
                        }
                    },
                    () = app.expiry(&proof) => {}
                }
                // Also where it cannot be asked.
                if let Err(error) = app.still_holds(&proof, &ground).await {
                    return error;
                }
            }
        }))
    }

    async fn still_holds(&self, proof: &Proof, ground: &Ground) -> Result<()> {
        self.live_token(proof.token).await?;
        match ground {
            Ground::Run(run) => self.run_for(&proof.caller, *run, Right::Read).await.map(drop),
            Ground::Environment { organization, environment } => {
                let right = Right::Operate;
                self.on(&proof.caller, organization, environment, right).await.map(drop)
            }
            Ground::State { organization, environment } => {
                let right = Right::Administer;
                self.on(&proof.caller, organization, environment, right).await.map(drop)
            }
            Ground::Organization(name) => self.owner(&proof.caller, name).await.map(drop),
        }
    }

    async fn expiry(&self, proof: &Proof) {
        match proof.expires_at {
            // Not in a hurry where the clock is set back.
            Some(at) => tokio::time::sleep(at.since(self.now()).max(Duration::from_secs(1))).await,
            None => std::future::pending().await,
        }
    }
}

/// Takes what a person or program sends, unless their right to it ends first.
pub(crate) async fn unless_lost<T, E: From<Error>>(
    lost: Lost,
    doing: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::select! {
        biased;
        error = lost => Err(error.into()),
        done = doing => done,
    }
}

/// Sends a blob part by part, until the right to it ends. A reader that has stopped finds that it
/// was closed.
pub(crate) fn parts(
    mut blob: BlobReader,
    lost: Lost,
) -> Until<ReceiverStream<Result<Vec<u8>>>, Error> {
    let (sender, parts) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let part = match blob.next().await {
                Ok(Some(data)) => Ok(data),
                Ok(None) => return,
                Err(error) => Err(Error::internal(error)),
            };
            let failed = part.is_err();
            match tokio::time::timeout(PATIENCE, sender.send(part)).await {
                Ok(Ok(())) if !failed => {}
                Ok(Ok(()) | Err(_)) => return,
                Err(_) => break,
            }
        }
        drop(blob);
        let message = "it was not read on for a minute; begin again";
        // What came must not be taken for the whole.
        let _ = sender.send(Err(Error::refused(Reason::StoreUnavailable, message))).await;
    });
    Until::new(lost, ReceiverStream::new(parts))
}

/// A stream that ends with an error the moment that one comes, whatever waits in it.
pub(crate) struct Until<S, E> {
    inner: S,
    /// Answers what the stream ends by.
    over: Pin<Box<dyn Future<Output = E> + Send>>,
    is_over: bool,
}

impl<S, E> Until<S, E> {
    pub(crate) fn new(over: Pin<Box<dyn Future<Output = E> + Send>>, inner: S) -> Self {
        Self { inner, over, is_over: false }
    }
}

impl<T, E, S> Stream for Until<S, E>
where
    S: Stream<Item = Result<T, E>> + Unpin,
{
    type Item = Result<T, E>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Poll::Ready(error) = self.over.as_mut().poll(context) {
            self.is_over = true;
            return Poll::Ready(Some(Err(error)));
        }
        Pin::new(&mut self.inner).poll_next(context)
    }
}

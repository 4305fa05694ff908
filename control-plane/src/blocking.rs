//! Where work goes that may block: onto threads made for it.
//!
//! A simulation has one thread, and what happens on it is all the time there is. It asks for such
//! work to be done where it stands, after a moment of its own time: so the same seed gives the same
//! order of events, and what is waited for can still be interrupted or overtaken.

use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::{JoinError, JoinHandle};
use tokio::time::Sleep;

/// How long work takes that is done where it is waited for; set by a simulation alone.
static IN_PLACE: OnceLock<Duration> = OnceLock::new();

/// Makes all such work of this process happen where it is waited for.
pub fn work_in_place(takes: Duration) {
    // The first word stands; a simulation has one.
    let _ = IN_PLACE.set(takes);
}

/// Work that was handed over. Dropping it does not stop what has begun.
pub(crate) enum Work<T> {
    Elsewhere(JoinHandle<T>),
    Here {
        pause: Pin<Box<Sleep>>,
        /// Away once it is done.
        work: Option<Box<dyn FnOnce() -> T + Send>>,
    },
}

/// Hands work over that may block.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Work<T> {
    match IN_PLACE.get() {
        Some(takes) => {
            let pause = Box::pin(tokio::time::sleep(*takes));
            Work::Here { pause, work: Some(Box::new(work)) }
        }
        None => Work::Elsewhere(tokio::task::spawn_blocking(work)),
    }
}

impl<T> Drop for Work<T> {
    /// Work on a thread goes on when nobody waits for it any more; so does this.
    fn drop(&mut self) {
        if let Work::Here { work, .. } = self
            && let Some(work) = work.take()
        {
            drop(work());
        }
    }
}

impl<T> Future for Work<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Work::Elsewhere(handle) => Pin::new(handle).poll(context),
            Work::Here { pause, work } => {
                std::task::ready!(pause.as_mut().poll(context));
                let work = work.take().expect("a future is not polled after it is ready");
                Poll::Ready(Ok(work()))
            }
        }
    }
}

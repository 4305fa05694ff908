//! Where work goes that may block: onto threads made for it.
//!
//! A simulation has one thread, and what happens on it is all the time there is. It asks for such
//! work to be done where it stands, so that the same seed gives the same order of events.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::task::{JoinError, JoinHandle};

/// Whether work is done where it is waited for; set by a simulation, never cleared.
static IN_PLACE: AtomicBool = AtomicBool::new(false);

/// Makes all such work of this process happen where it is waited for.
pub fn work_in_place() {
    IN_PLACE.store(true, Ordering::SeqCst);
}

/// Work that was handed over. Dropping it does not stop what has begun.
pub(crate) enum Work<T> {
    Elsewhere(JoinHandle<T>),
    /// Away once it is done.
    Here(Option<Box<dyn FnOnce() -> T + Send>>),
}

/// Hands work over that may block.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Work<T> {
    if IN_PLACE.load(Ordering::SeqCst) {
        Work::Here(Some(Box::new(work)))
    } else {
        Work::Elsewhere(tokio::task::spawn_blocking(work))
    }
}

impl<T> Future for Work<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Work::Elsewhere(handle) => Pin::new(handle).poll(context),
            Work::Here(work) => {
                let work = work.take().expect("a future is not polled after it is ready");
                Poll::Ready(Ok(work()))
            }
        }
    }
}

//! What a command prints through a pipe, read to its end or to a moment after the command's.
//!
//! A pipe ends when nobody holds its other end any more. Somebody may hold it who cannot be
//! killed, or was handed it by the command: nobody waits for those.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::sync::watch;

/// How long what is in the pipe may take after the command's end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How much of a command's output is held in memory.
pub(super) const LARGEST_OUTPUT: usize = 256 << 20;

/// A pipe that ends a moment after its command, if it must.
pub(super) struct Output<R> {
    pipe: R,
    over: Pin<Box<dyn Future<Output = ()> + Send>>,
    is_over: bool,
}

impl<R> Output<R> {
    /// `over` becomes true, or loses its sender, when the command has ended.
    pub(super) fn new(pipe: R, mut over: watch::Receiver<bool>) -> Self {
        let over = Box::pin(async move {
            let _ = over.wait_for(|over| *over).await;
            tokio::time::sleep(LAST_WORDS).await;
        });
        Self { pipe, over, is_over: false }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Output<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.is_over {
            return Poll::Ready(Ok(()));
        }
        // First: what is there is read in any case.
        if let Poll::Ready(read) = Pin::new(&mut this.pipe).poll_read(context, buffer) {
            return Poll::Ready(read);
        }
        match this.over.as_mut().poll(context) {
            Poll::Ready(()) => {
                this.is_over = true;
                Poll::Ready(Ok(()))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// What was printed, as far as it is held.
#[derive(Debug, Default)]
pub(super) struct Printed {
    pub(super) bytes: Vec<u8>,
    /// In bytes: how much more there was.
    pub(super) left_out: u64,
}

/// Reads everything, and holds so many bytes of it: whoever prints is not stopped by the limit.
pub(super) async fn read(
    output: Option<Output<impl AsyncRead + Unpin>>,
    most: usize,
) -> io::Result<Printed> {
    let mut printed = Printed::default();
    if let Some(mut output) = output {
        (&mut output).take(most as u64).read_to_end(&mut printed.bytes).await?;
        printed.left_out = tokio::io::copy(&mut output, &mut tokio::io::sink()).await?;
    }
    Ok(printed)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_pipe_that_somebody_holds_ends_with_its_command() {
        let (mut held, pipe) = tokio::io::duplex(64);
        held.write_all(b"said").await.unwrap();
        let (over_to, over) = watch::channel(false);
        let mut reading = Box::pin(read(Some(Output::new(pipe, over)), LARGEST_OUTPUT));
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, &mut reading).await.is_err());
        over_to.send_replace(true);
        held.write_all(b" last").await.unwrap();
        assert_eq!(reading.await.unwrap().bytes, b"said last");
        drop(held);
    }

    #[tokio::test]
    async fn what_is_too_much_is_read_and_not_held() {
        let (_over_to, over) = watch::channel(false);
        let flood: &[u8] = &[b'x'; 1000];
        let printed = read(Some(Output::new(flood, over)), 100).await.unwrap();
        assert_eq!((printed.bytes.len(), printed.left_out), (100, 900));
    }
}

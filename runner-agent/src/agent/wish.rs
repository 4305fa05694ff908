//! What a person wants of this process, told by signals.
//!
//! SIGTERM and SIGINT climb: drain, cancel, leave. With `--on-sigterm leave`, and always by
//! SIGQUIT, the first one leaves: jobs go on under their supervisors, and the next agent takes
//! them up.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wish {
    Stay,
    /// Take nothing new, finish what runs, ship it, end.
    Drain,
    /// Ask what runs to stop as well.
    Cancel,
    /// End at once; supervisors go on.
    Leave,
}

/// What the first signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OnSigterm {
    Drain,
    Leave,
}

impl Wish {
    fn after_a_signal(self, on_sigterm: OnSigterm) -> Self {
        match (self, on_sigterm) {
            (Self::Stay, OnSigterm::Drain) => Self::Drain,
            (Self::Drain, OnSigterm::Drain) => Self::Cancel,
            (Self::Cancel | Self::Leave, OnSigterm::Drain) | (_, OnSigterm::Leave) => Self::Leave,
        }
    }
}

/// Listens for signals from now on.
pub(super) fn listen(on_sigterm: OnSigterm) -> io::Result<watch::Receiver<Wish>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let (wish_to, wish) = watch::channel(Wish::Stay);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = quit.recv() => {
                    wish_to.send_replace(Wish::Leave);
                    continue;
                }
            }
            wish_to.send_modify(|wish| *wish = wish.after_a_signal(on_sigterm));
        }
    });
    Ok(wish)
}

/// Waits until the wish changes. Safe to abandon and call again.
pub(super) async fn changed(wish: &mut watch::Receiver<Wish>) -> Wish {
    match wish.changed().await {
        Ok(()) => *wish.borrow_and_update(),
        // Whoever could wish is gone.
        Err(_) => Wish::Leave,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_signals_drain_then_cancel_then_leave() {
        let climb = |on_sigterm| {
            let mut wish = Wish::Stay;
            [(); 4].map(|()| {
                wish = wish.after_a_signal(on_sigterm);
                wish
            })
        };
        assert_eq!(climb(OnSigterm::Drain), [Wish::Drain, Wish::Cancel, Wish::Leave, Wish::Leave]);
        assert_eq!(climb(OnSigterm::Leave), [Wish::Leave; 4]);
    }
}

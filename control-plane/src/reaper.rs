//! Periodic, idempotent work that no request waits for: turns that were not given, jobs and
//! leases that dispatch lost sight of, limits that their timer missed, content that nothing needs.
//!
//! Whatever follows a commit is done at once by who committed. Should that have failed, the
//! reaper finds it in the store. Each duty has a round of its own: none waits for another.

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::app::App;

const PERIOD: Duration = Duration::from_secs(30);

/// Runs until the process ends.
pub async fn run(app: Arc<App>) {
    tokio::join!(
        every(PERIOD, "resume open runs", || app.reconcile()),
        every(PERIOD, "find limits again", || app.note_all_limits()),
        every(PERIOD, "give turns", || app.give_all_turns()),
        every(PERIOD, "delete what nothing needs", || app.collect_garbage()),
        every(PERIOD, "delete sessions that have run out", || app.prune_sessions()),
        every(PERIOD, "tell whose passwords are guessed", || app.tell_guesses()),
        every(PERIOD, "look for what nobody needs", || app.sweep_blobs()),
    );
}

async fn every<F, E: Display>(period: Duration, duty: &'static str, work: impl Fn() -> F)
where
    F: Future<Output = Result<(), E>>,
{
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick is immediate; the start has just done all this.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        if let Err(error) = work().await {
            tracing::warn!(error = %error, duty, "the reaper could not do all its work");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use latchkey_domain::policy::MfaPolicy;

    use super::*;
    use crate::app::fixture::Fixture;
    use crate::app::settings::SettingsChange;
    use crate::store::record::environment::Limits;

    #[tokio::test]
    async fn a_limit_that_the_timer_missed_is_found_again() {
        let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
        let limits = Limits { person: Some(600), ..Limits::default() };
        fixture.settings(SettingsChange { limits: Some(limits), ..Default::default() }).await;
        let run = fixture.queue("one").await;
        // Its timer is that of another process, or was set in the wrong order.
        let app = fixture.restarted(None).await;
        fixture.clock.advance(Duration::from_secs(600));
        tokio::time::pause();
        let _ = tokio::time::timeout(PERIOD + PERIOD / 2, super::run(Arc::clone(&app))).await;
        tokio::time::resume();
        app.enforce_limits().await;
        assert!(fixture.run(&run).await.state.is_end());
    }

    #[tokio::test(start_paused = true)]
    async fn a_duty_that_hangs_or_fails_holds_up_no_other() {
        let done = Cell::new(0);
        let hangs = every(PERIOD, "hang", std::future::pending::<Result<(), String>>);
        let fails = every(PERIOD, "fail", async || Err::<(), _>("no"));
        let works = every(PERIOD, "work", async || {
            done.set(done.get() + 1);
            Ok::<(), String>(())
        });
        let all = async { tokio::join!(hangs, fails, works) };
        let _ = tokio::time::timeout(PERIOD * 3 + PERIOD / 2, all).await;
        assert_eq!(done.get(), 3);
    }
}

//! Periodic, idempotent work that no request waits for: turns that were not given, jobs and
//! leases that dispatch lost sight of, content that nothing needs.
//!
//! Whatever follows a commit is done at once by who committed. Should that have failed, the
//! reaper finds it in the store.

use std::sync::Arc;
use std::time::Duration;

use crate::app::App;

const PERIOD: Duration = Duration::from_secs(30);

/// Runs until the process ends.
pub async fn run(app: Arc<App>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick is immediate; the start has just done all this.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let work = async {
            app.reconcile().await?;
            app.give_all_turns().await?;
            app.collect_garbage().await
        };
        if let Err(error) = work.await {
            tracing::warn!(error = %error, "the reaper could not do all its work");
        }
    }
}

//! Waiting for a state to be reached.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long anything may take here: generous, since it is only reached when something is wrong.
pub const LIMIT: Duration = Duration::from_secs(60);

const PAUSE: Duration = Duration::from_millis(15);

/// Asks again and again until the answer is `Ok`. An `Err` says what was seen instead; the last
/// one is part of the error once the limit has passed.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    let mut last = "nothing".to_owned();
    while start.elapsed() < limit {
        // A look that hangs must not outlast the limit either.
        match tokio::time::timeout(limit.saturating_sub(start.elapsed()), look()).await {
            Ok(Ok(reached)) => return Ok(reached),
            Ok(Err(seen)) => last = seen,
            Err(_) => break,
        }
        sleep(PAUSE).await;
    }
    anyhow::bail!("waited {limit:?} for {what}; last seen: {last}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_limit_tells_what_was_seen_last() {
        let limit = Duration::from_millis(50);
        let waited = wait_for("rain", limit, async || Err::<(), _>("sunshine".into())).await;
        let error = waited.unwrap_err().to_string();
        assert!(error.contains("rain") && error.contains("sunshine"), "{error}");
    }

    #[tokio::test]
    async fn a_look_that_hangs_is_given_up_too() {
        let limit = Duration::from_millis(50);
        let waited = wait_for("rain", limit, async || std::future::pending().await).await;
        assert!(waited.map(|()| "reached").is_err());
    }
}

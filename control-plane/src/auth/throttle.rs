//! How often a password may be tried: per account, whether there is such an account or not, and
//! per source.
//!
//! Each has a bucket that refills with time. An attempt is charged before it is checked, so that
//! many at once get no further; a right password takes its charge back. Kept in memory and
//! bounded: when a table is full, whoever is nearest to forgiveness is forgotten, so nobody can
//! wash an account's refusals away by naming others.
//!
//! Whoever keeps guessing holds up the account's owner, too: their open sessions and their token
//! stay good meanwhile, and so does what they change by them.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use latchkey_domain::id::{Digest, UserId};
use latchkey_domain::time::Timestamp;

use super::sha256;

/// Five at once, then one in thirty seconds.
const ACCOUNT: Rate = Rate { burst: 5, period: Duration::from_secs(30) };

/// Twenty at once, then one in three seconds: many people may stand behind one address.
const SOURCE: Rate = Rate { burst: 20, period: Duration::from_secs(3) };

/// How often it is told that an account is being guessed at.
const TOLD_EVERY: Duration = Duration::from_secs(3600);

/// How many accounts, and how many sources, are known at once.
const MOST: usize = 8192;

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: u32,
    period: Duration,
}

/// Who is tried, by whom.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    account: Digest,
    source: IpAddr,
}

impl Attempt {
    /// `source` is unknown where nothing connected: all such are one.
    pub fn new(account: &str, source: Option<IpAddr>) -> Self {
        let source = source.unwrap_or(Ipv6Addr::UNSPECIFIED.into());
        Self { account: sha256(account.as_bytes()), source: network(source) }
    }

    /// Of a user who has proved who they are.
    pub fn of_user(user: UserId, source: Option<IpAddr>) -> Self {
        Self::new(&user.to_string(), source)
    }
}

/// A host has a /64 of IPv6 at least, and every address in it.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[derive(Debug, Default)]
pub struct Throttle(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    accounts: HashMap<Digest, Bucket>,
    sources: HashMap<IpAddr, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// When all is forgiven.
    full_at: Timestamp,
    /// Since the last right password.
    refused: u32,
    /// When somebody was last told of the refusals.
    told_at: Option<Timestamp>,
}

impl Throttle {
    /// Charges an attempt, or says when to come again.
    pub fn begin(&self, attempt: Attempt, now: Timestamp) -> Result<(), Timestamp> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Tables { accounts, sources } = &mut *tables;
        let account = charged(accounts.get(&attempt.account), ACCOUNT, now);
        let source = charged(sources.get(&attempt.source), SOURCE, now);
        match (account, source) {
            (Ok(account), Ok(source)) => {
                keep(accounts, attempt.account, account, now);
                keep(sources, attempt.source, source, now);
                Ok(())
            }
            (Err(at), Ok(_)) | (Ok(_), Err(at)) => Err(at),
            (Err(one), Err(other)) => Err(one.max(other)),
        }
    }

    /// Charges the account alone: of somebody who has proved who they are.
    pub fn begin_account(&self, attempt: Attempt, now: Timestamp) -> Result<(), Timestamp> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let account = charged(tables.accounts.get(&attempt.account), ACCOUNT, now)?;
        keep(&mut tables.accounts, attempt.account, account, now);
        Ok(())
    }

    /// Remembers that it was wrong.
    pub fn refused(&self, attempt: Attempt) {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = tables.accounts.get_mut(&attempt.account) {
            bucket.refused = bucket.refused.saturating_add(1);
        }
    }

    /// Answers how many were refused, as far as is known, once in an hour.
    pub fn untold(&self, attempt: Attempt, now: Timestamp) -> Option<u32> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = tables.accounts.get_mut(&attempt.account)?;
        if bucket.refused == 0 || bucket.told_at.is_some_and(|at| now < at + TOLD_EVERY) {
            return None;
        }
        bucket.told_at = Some(now);
        Some(bucket.refused)
    }

    /// Answers how many were refused since the last that succeeded.
    pub fn refusals(&self, attempt: Attempt) -> u32 {
        let tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tables.accounts.get(&attempt.account).map_or(0, |bucket| bucket.refused)
    }

    /// Takes the charge back, and answers how many were refused before, as far as is known.
    pub fn succeeded(&self, attempt: Attempt) -> u32 {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = tables.sources.get_mut(&attempt.source) {
            bucket.full_at = earlier(bucket.full_at, SOURCE.period);
        }
        tables.accounts.remove(&attempt.account).map_or(0, |bucket| bucket.refused)
    }
}

/// Returns the bucket after one more attempt, or when there is room for one.
fn charged(bucket: Option<&Bucket>, rate: Rate, now: Timestamp) -> Result<Bucket, Timestamp> {
    let Rate { burst, period } = rate;
    // Later than this it cannot be, unless somebody set the clock back.
    let latest = now + period * burst;
    let full_at = bucket.map_or(now, |bucket| bucket.full_at.clamp(now, latest));
    let room_at = earlier(full_at, period * (burst - 1));
    if room_at > now {
        return Err(room_at);
    }
    let (refused, told_at) = bucket.map_or((0, None), |bucket| (bucket.refused, bucket.told_at));
    Ok(Bucket { full_at: full_at + period, refused, told_at })
}

fn keep<K: Eq + Hash + Copy>(
    table: &mut HashMap<K, Bucket>,
    key: K,
    bucket: Bucket,
    now: Timestamp,
) {
    if table.len() >= MOST && !table.contains_key(&key) {
        table.retain(|_, bucket| bucket.full_at > now);
        if table.len() >= MOST {
            let first = table.iter().min_by_key(|(_, bucket)| bucket.full_at).map(|(key, _)| *key);
            first.map(|first| table.remove(&first));
        }
    }
    table.insert(key, bucket);
}

fn earlier(time: Timestamp, by: Duration) -> Timestamp {
    let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_millis(time.as_millis().saturating_sub(by))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000);

    fn from(account: &str, source: [u8; 4]) -> Attempt {
        Attempt::new(account, Some(source.into()))
    }

    #[test]
    fn an_account_is_tried_five_times_and_then_once_in_thirty_seconds() {
        let throttle = Throttle::default();
        // Each from elsewhere.
        for n in 0..5 {
            throttle.begin(from("ada", [10, 0, 0, n]), NOW).unwrap();
            throttle.refused(from("ada", [10, 0, 0, n]));
        }
        let retry_at = throttle.begin(from("ada", [10, 0, 0, 9]), NOW).unwrap_err();
        assert_eq!(retry_at.since(NOW), Duration::from_secs(30));
        throttle.begin(from("bob", [10, 0, 0, 9]), NOW).unwrap();
        throttle.begin(from("ada", [10, 0, 0, 9]), retry_at).unwrap();
        assert!(throttle.begin(from("ada", [10, 0, 0, 9]), retry_at).is_err());
        // A right one ends it, and tells how it was before.
        assert_eq!(throttle.succeeded(from("ada", [10, 0, 0, 9])), 5);
        throttle.begin(from("ada", [10, 0, 0, 8]), retry_at).unwrap();
    }

    #[test]
    fn a_source_is_held_up_whomever_it_names_and_a_right_password_costs_nothing() {
        let throttle = Throttle::default();
        for n in 0..20 {
            throttle.begin(from(&format!("user-{n}"), [10, 0, 0, 1]), NOW).unwrap();
        }
        let retry_at = throttle.begin(from("another", [10, 0, 0, 1]), NOW).unwrap_err();
        assert_eq!(retry_at.since(NOW), Duration::from_secs(3));
        throttle.succeeded(from("user-3", [10, 0, 0, 1]));
        throttle.begin(from("another", [10, 0, 0, 1]), NOW).unwrap();
        let v6 = |text: &str| network(text.parse().unwrap());
        assert_eq!(v6("2001:db8::1"), v6("2001:db8::2:0:0:9"));
        assert_ne!(v6("2001:db8::1"), v6("2001:db8:0:1::1"));
        assert_eq!(v6("::ffff:10.0.0.1"), v6("10.0.0.1"));
    }

    #[test]
    fn the_tables_are_bounded_and_a_refused_account_is_not_washed_out() {
        let throttle = Throttle::default();
        for _ in 0..5 {
            throttle.begin(from("ada", [10, 0, 0, 1]), NOW).unwrap();
        }
        for n in 0..2 * u32::try_from(MOST).unwrap() {
            let source = (n + 0x0b00_0000).to_be_bytes();
            throttle.begin(from(&format!("user-{n}"), source), NOW).unwrap();
        }
        let tables = throttle.0.lock().unwrap();
        assert!(tables.accounts.len() <= MOST && tables.sources.len() <= MOST);
        drop(tables);
        assert!(throttle.begin(from("ada", [10, 9, 9, 9]), NOW).is_err());
    }

    #[test]
    fn a_clock_that_was_set_back_locks_nobody_out() {
        let throttle = Throttle::default();
        for _ in 0..5 {
            throttle.begin(from("ada", [10, 0, 0, 1]), NOW).unwrap();
        }
        let before = Timestamp::from_millis(0);
        let retry_at = throttle.begin(from("ada", [10, 0, 0, 1]), before).unwrap_err();
        assert_eq!(retry_at.since(before), Duration::from_secs(30));
    }
}

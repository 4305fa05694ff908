//! The control API of the simulation: JSON under `/_simulator`, for those outside its process.
//!
//! | request | answer |
//! |---|---|
//! | `GET facts` | what is there to begin with: address, key, serial, roles |
//! | `GET code?serial=S[&offset=N][&unused=true]` | a code of the device, and for how long |
//! | `GET device?serial=S` | attempts left in the window, seconds until the next |
//! | `GET counts[?code=C]` | requests by action and by code, or with one code |
//! | `GET calls` | every request seen |
//! | `GET, POST, DELETE faults` | the script; a post adds one fault or a list |
//! | `POST users, keys, devices, roles, buckets` | adds, or replaces what has the same name |
//! | `POST key-status` | switches a key on and off |
//! | `DELETE devices?serial=S` | takes a device away |
//! | `POST clock` | moves time: `{"advance_seconds": N}` or `{"set": "2026-…Z"}` |
//!
//! It hands out codes and secrets to whoever asks, which is why the simulation listens on
//! loopback only.

use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::device::{ATTEMPT_WINDOW_SECONDS, ATTEMPTS_PER_WINDOW};
use crate::faults::Fault;
use crate::state::Shared;
use crate::totp::{self, STEP_SECONDS};
use crate::world::{AccessKey, Bucket, Device, Invalid, KeyStatus, Role, User};

/// A code of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeOfDevice {
    pub code: String,
    /// Which step the code belongs to.
    pub step: i64,
    /// How long until the device shows its next code.
    pub seconds_until_next: i64,
}

type Answer = Result<Json<Value>, (StatusCode, Json<Value>)>;

pub(crate) fn router() -> Router<Shared> {
    Router::new()
        .route("/facts", get(facts))
        .route("/code", get(code))
        .route("/device", get(device))
        .route("/counts", get(counts))
        .route("/calls", get(calls))
        .route("/faults", get(list_faults).post(add_faults).delete(clear_faults))
        .route("/users", post(add_user))
        .route("/keys", post(put_key))
        .route("/key-status", post(set_key_status))
        .route("/devices", post(put_device).delete(remove_device))
        .route("/roles", post(put_role))
        .route("/buckets", post(put_bucket))
        .route("/clock", post(move_clock))
        .fallback(async || StatusCode::NOT_FOUND)
}

/// Finds the code of a step that is `offset` steps from the current one.
pub(crate) fn code_at(shared: &Shared, serial: &str, offset: i64) -> Option<CodeOfDevice> {
    let now = shared.clock.now().as_second();
    let seed = shared.lock().world.device(serial)?.seed_bytes();
    Some(code_of(&seed, totp::step_at(now) + offset, now))
}

/// Finds the oldest code that would be accepted now.
pub(crate) fn unused_code(shared: &Shared, serial: &str) -> Option<CodeOfDevice> {
    let now = shared.clock.now().as_second();
    let state = shared.lock();
    let seed = state.world.device(serial)?.seed_bytes();
    Some(code_of(&seed, state.devices.unused_step(serial, now)?, now))
}

fn code_of(seed: &[u8], step: i64, now: i64) -> CodeOfDevice {
    CodeOfDevice {
        code: totp::code(seed, step),
        step,
        seconds_until_next: STEP_SECONDS - now.rem_euclid(STEP_SECONDS),
    }
}

async fn facts(Extract(shared): Extract<Shared>) -> Answer {
    Ok(Json(json!(crate::facts::Facts::of(&shared))))
}

#[derive(Deserialize)]
struct CodeQuery {
    serial: String,
    #[serde(default)]
    offset: i64,
    #[serde(default)]
    unused: bool,
}

async fn code(Extract(shared): Extract<Shared>, Query(query): Query<CodeQuery>) -> Answer {
    let found = if query.unused {
        unused_code(&shared, &query.serial)
    } else {
        code_at(&shared, &query.serial, query.offset)
    };
    let why = if query.unused { "no unused code of this device" } else { "no such device" };
    found.map(|code| Json(json!(code))).ok_or_else(|| missing(why))
}

#[derive(Deserialize)]
struct SerialQuery {
    serial: String,
}

async fn device(Extract(shared): Extract<Shared>, Query(query): Query<SerialQuery>) -> Answer {
    let now = shared.clock.now().as_second();
    let state = shared.lock();
    if state.world.device(&query.serial).is_none() {
        return Err(missing("no such device"));
    }
    Ok(Json(json!({
        "attempts_per_window": ATTEMPTS_PER_WINDOW,
        "attempts_left": state.devices.attempts_left(&query.serial, now),
        "seconds_until_window_ends": ATTEMPT_WINDOW_SECONDS - now.rem_euclid(ATTEMPT_WINDOW_SECONDS),
    })))
}

#[derive(Deserialize)]
struct CountsQuery {
    code: Option<String>,
}

async fn counts(Extract(shared): Extract<Shared>, Query(query): Query<CountsQuery>) -> Answer {
    let state = shared.lock();
    Ok(Json(match query.code {
        Some(code) => json!({ "count": state.journal.with_code(&code) }),
        None => json!({
            "total": state.journal.calls().len(),
            "by_action": state.journal.by_action(),
            "by_code": state.journal.by_code(),
        }),
    }))
}

async fn calls(Extract(shared): Extract<Shared>) -> Answer {
    Ok(Json(json!(shared.lock().journal.calls())))
}

async fn list_faults(Extract(shared): Extract<Shared>) -> Answer {
    Ok(Json(json!(shared.lock().script.waiting())))
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    More(Vec<Fault>),
    One(Fault),
}

async fn add_faults(Extract(shared): Extract<Shared>, Json(faults): Json<OneOrMore>) -> Answer {
    let mut state = shared.lock();
    let faults = match faults {
        OneOrMore::More(faults) => faults,
        OneOrMore::One(fault) => vec![fault],
    };
    for fault in faults {
        state.script.push(fault);
    }
    Ok(Json(json!(state.script.waiting())))
}

async fn clear_faults(Extract(shared): Extract<Shared>) -> Answer {
    shared.lock().script.clear();
    Ok(Json(json!([])))
}

/// Where in the world something is put, and what.
#[derive(Deserialize)]
struct Addition<T> {
    account: String,
    #[serde(flatten)]
    what: T,
}

#[derive(Deserialize)]
struct OfUser<T> {
    user: String,
    #[serde(flatten)]
    what: T,
}

async fn add_user(
    Extract(shared): Extract<Shared>,
    Json(Addition { account, what }): Json<Addition<User>>,
) -> Answer {
    let name = what.name.clone();
    let mut state = shared.lock();
    state.world.add_user(&account, what).map_err(refused)?;
    let user = state
        .world
        .account(&account)
        .and_then(|account| account.users.iter().find(|user| user.name == name));
    Ok(Json(json!(user)))
}

async fn put_key(
    Extract(shared): Extract<Shared>,
    Json(Addition { account, what: OfUser { user, what } }): Json<Addition<OfUser<AccessKey>>>,
) -> Answer {
    let mut state = shared.lock();
    state.world.put_key(&account, &user, what).map_err(refused)?;
    let key = state
        .world
        .account(&account)
        .and_then(|account| account.users.iter().find(|known| known.name == user))
        .and_then(|user| user.access_keys.last());
    Ok(Json(json!(key)))
}

async fn put_device(
    Extract(shared): Extract<Shared>,
    Json(Addition { account, what: OfUser { user, what } }): Json<Addition<OfUser<Device>>>,
) -> Answer {
    let serial = what.serial.clone();
    let mut state = shared.lock();
    state.world.put_device(&account, &user, what).map_err(refused)?;
    state.devices.replaced(&serial);
    Ok(Json(json!(state.world.device(&serial))))
}

async fn remove_device(
    Extract(shared): Extract<Shared>,
    Query(query): Query<SerialQuery>,
) -> Answer {
    shared.lock().world.remove_device(&query.serial).map_err(refused)?;
    Ok(Json(json!({})))
}

async fn put_role(
    Extract(shared): Extract<Shared>,
    Json(Addition { account, what }): Json<Addition<Role>>,
) -> Answer {
    shared.lock().world.put_role(&account, what).map_err(refused)?;
    Ok(Json(json!({})))
}

async fn put_bucket(Extract(shared): Extract<Shared>, Json(bucket): Json<Bucket>) -> Answer {
    let mut state = shared.lock();
    state.world.buckets.retain(|known| known.name != bucket.name);
    state.world.buckets.push(bucket);
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct StatusOfKey {
    id: String,
    status: KeyStatus,
}

async fn set_key_status(
    Extract(shared): Extract<Shared>,
    Json(change): Json<StatusOfKey>,
) -> Answer {
    shared.lock().world.set_key_status(&change.id, change.status).map_err(refused)?;
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ClockMove {
    AdvanceSeconds(i64),
    Set(String),
}

async fn move_clock(Extract(shared): Extract<Shared>, Json(change): Json<ClockMove>) -> Answer {
    match change {
        ClockMove::AdvanceSeconds(seconds) => {
            shared.clock.advance(SignedDuration::from_secs(seconds));
        }
        ClockMove::Set(to) => {
            let to: Timestamp = to.parse().map_err(|_| {
                (StatusCode::BAD_REQUEST, Json(json!({ "error": "failed to read the time" })))
            })?;
            shared.clock.set(to);
        }
    }
    Ok(Json(json!({ "now": shared.clock.now().to_string() })))
}

fn refused(why: Invalid) -> (StatusCode, Json<Value>) {
    let status = match why {
        Invalid::Unknown(_) => StatusCode::NOT_FOUND,
        Invalid::AccountId(_) | Invalid::Seed(_) | Invalid::Duplicate(_) | Invalid::KeyId(_) => {
            StatusCode::BAD_REQUEST
        }
    };
    (status, Json(json!({ "error": format!("failed to {why}") })))
}

fn missing(why: &str) -> (StatusCode, Json<Value>) {
    (StatusCode::NOT_FOUND, Json(json!({ "error": why })))
}

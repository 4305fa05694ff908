//! What commands show: structs with stable names for `-o json`, made from the wire's messages by
//! hand so that the wire can change without them, and their text for people.

pub(crate) mod account;
pub(crate) mod check;
pub(crate) mod environment;
pub(crate) mod member;
pub(crate) mod notice;
pub(crate) mod pool;
pub(crate) mod progress;
pub(crate) mod quarantine;
pub(crate) mod run;
pub(crate) mod state;

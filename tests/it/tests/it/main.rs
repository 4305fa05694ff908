//! The integration tests: real processes, real gRPC, a real terraform. A module per story.
//!
//! Each stands under `cfg(test)`, so that lints know helpers as parts of tests, too.

#[cfg(test)]
mod access;
#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod break_glass;
#[cfg(test)]
mod cancel;
#[cfg(test)]
mod commands;
#[cfg(test)]
mod crashes;
#[cfg(test)]
mod credentials;
#[cfg(test)]
mod demo;
#[cfg(test)]
mod doctor;
#[cfg(test)]
mod gated;
#[cfg(test)]
mod hooks;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kinds;
#[cfg(test)]
mod main_story;
#[cfg(test)]
mod notices;
#[cfg(test)]
mod people;
#[cfg(test)]
mod plan_rules;
#[cfg(test)]
mod processes;
#[cfg(test)]
mod provider;
#[cfg(test)]
mod readme;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod restore;
#[cfg(test)]
mod runners;
#[cfg(test)]
mod secrets;
#[cfg(test)]
mod support;
#[cfg(test)]
mod terminal;
#[cfg(test)]
mod told;
#[cfg(test)]
mod top_up;
#[cfg(test)]
mod variables;
#[cfg(test)]
mod workstation;

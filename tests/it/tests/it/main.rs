//! The integration tests: real processes, real gRPC, a real terraform. A module per story.
//!
//! Each stands under `cfg(test)`, so that lints know helpers as parts of tests, too.

#[cfg(test)]
mod demo;
#[cfg(test)]
mod main_story;
#[cfg(test)]
mod processes;
#[cfg(test)]
mod readme;
#[cfg(test)]
mod support;

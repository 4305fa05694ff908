//! The integration tests: real processes, real gRPC, a real terraform. A module per story.

mod demo;
mod main_story;
mod processes;
mod support;

//! What tests need to play with a whole Latchkey: real processes, real gRPC, a real terraform.
//!
//! ```no_run
//! # async fn story() -> anyhow::Result<()> {
//! use latchkey_harness::{Configuration, Programs, Stage, StageOptions, after_plan, is_ended};
//! use latchkey_proto::v1::{MfaPolicy, RunState};
//!
//! // 1. A stage: simulated AWS, control plane, runner; ada is the owner of acme, the triple is
//! //    set, the account listed, and the runner of pool `build` connected.
//! let programs = Programs::in_one("path/to/latchkey-it");
//! let mut stage = Stage::start(StageOptions::new(programs)).await?;
//! let ada = stage.owner.clone();
//!
//! // 2. An environment and a run.
//! ada.create_environment("web", MfaPolicy::PlansAndApplies).await?;
//! let main = r#"resource "terraform_data" "one" {}"#;
//! let run = ada.queue("web", &Configuration::of(&[("main.tf", main)])).await?;
//!
//! // 3. Codes come from the device; waiting is for a state, with a limit.
//! ada.authenticate(&run.run_id, &stage.aws.unused_code().await?).await?;
//! let run = ada.wait_for_run(&run.run_id, "the plan's end", after_plan).await?;
//! assert_eq!(run.state(), RunState::AwaitingApplyMfa);
//!
//! // 4. Faults: SIGKILL, and the same data on the same ports again.
//! stage.plane.kill().await?;
//! stage.plane.restart().await?;
//! ada.authenticate(&run.run_id, &stage.aws.unused_code().await?).await?;
//! let run = ada.wait_for_run(&run.run_id, "its end", is_ended).await?;
//! assert_eq!(run.state(), RunState::Applied);
//! # Ok(())
//! # }
//! ```
//!
//! | part | what it is |
//! |---|---|
//! | [`Stage`] | all of it, in a temporary directory; start here |
//! | [`Aws`] | the simulated AWS, in process (tests look inside) or as a process (demo) |
//! | [`TestPlane`] | the control plane's process; keeps its data and ports over `kill`, `restart` |
//! | [`TestRunner`] | a runner's process; `kill` leaves its supervisors alive, as in life |
//! | [`Person`] | somebody with a token: typed clients, and the usual calls in one line |
//! | [`Proxy`] | a network between two programs that can be cut, stalled, slowed |
//! | [`Hooks`], [`MailServer`] | receivers of notices, certified by a [`TestAuthority`] |
//! | [`stub`] | a terraform that does as told and writes down what it did |
//! | [`simulated_runner`] | the runner's protocol without a host |
//! | [`Configuration`] | Terraform files, packed |
//! | [`wait_for`] | a state reached, a limit, and what was seen last |
//! | [`files_with`] | which files hold some bytes: for secrets that must be nowhere |
//! | [`engine`] | the terraform or tofu of this host, installed where there is none |
//!
//! Nothing outlives its handle: dropping a stage kills its processes, supervisors and terraforms,
//! and programs started through [`Programs`] end with whoever started them, even after SIGKILL.
//! A stage keeps its directory when a test panics, or when `LATCHKEY_KEEP` is set, and says where.

mod authority;
mod aws;
mod configuration;
pub mod engine;
mod hooks;
mod mail_server;
mod person;
mod plane;
mod process;
mod program;
mod proxy;
mod runner;
mod search;
pub mod simulated_runner;
mod stage;
pub mod stub;
mod wait;

pub use crate::authority::TestAuthority;
pub use crate::aws::Aws;
pub use crate::configuration::Configuration;
pub use crate::hooks::{Hook, Hooks};
pub use crate::mail_server::{Mail, MailServer, Offer};
pub use crate::person::{Authorized, Bearer, Person, after_plan, is_ended, reason};
pub use crate::plane::{PlaneOptions, TestPlane, finished};
pub use crate::process::Process;
pub use crate::program::{Program, Programs, TETHERED};
pub use crate::proxy::{Flow, Network, Proxy};
pub use crate::runner::{RunnerOptions, TestRunner};
pub use crate::search::files_with;
pub use crate::stage::{AwsKind, Stage, StageOptions};
pub use crate::wait::{LIMIT, wait_for};

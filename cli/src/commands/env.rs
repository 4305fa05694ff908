//! `env`: environments and their settings.

mod doctor;
mod flags;

use clap::{Args, Subcommand, ValueEnum};
use uuid::Uuid;

use latchkey_proto::v1;

use self::flags::{Approval, LimitFlags, RoleFlags};
use crate::Done;
use crate::change::{self, Ask};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view::environment::{EnvironmentListView, EnvironmentView};
use crate::words::parse_duration;

#[derive(Debug, Subcommand)]
pub(crate) enum Env {
    /// Makes an environment
    ///
    /// Where it gives or allows more than an environment does by default, it takes a token code,
    /// which is asked for.
    Create {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        #[command(flatten)]
        settings: Settings,
    },
    /// Shows an environment
    Show {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
    },
    /// Lists the environments
    List,
    /// Changes the settings that are named
    Set {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        #[command(flatten)]
        settings: Settings,
        /// Ask for a token code at once. Without, one is asked for where the change takes one:
        /// where it protects less than before
        #[arg(long)]
        with_code: bool,
    },
    /// Keeps runs that would change anything, and others' work on the state, from starting
    Lock {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// Why; everybody who waits is told
        #[arg(long)]
        reason: String,
    },
    /// Takes the lock away, whoever has put it
    Unlock {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
    },
    /// Tries the AWS set-up step by step and says what to fix; spends a code only when given one
    Doctor(doctor::Doctor),
    /// Starts runs again after you have dealt with the remains of a run; owners only
    Unfreeze {
        environment: String,
        /// The run that froze it, as `env show` names it
        #[arg(long)]
        run: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Which phases start only after a token code; owners only
    #[arg(long, value_enum, value_name = "POLICY")]
    mfa_policy: Option<Policy>,
    /// Apply without a confirmation where no code is required; owners only
    #[arg(long, value_name = "true|false")]
    auto_apply: Option<bool>,
    /// Directory of the root module inside the uploaded one
    #[arg(long, value_name = "DIR")]
    working_directory: Option<String>,
    /// Pool whose runners execute the jobs
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,
    /// Life of the sessions that phases get, such as 1h; 15 minutes to 36 hours, and 12 hours at
    /// most for roles
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    session_duration: Option<prost_types::Duration>,
    /// What terraform gets when no code is required; owners only
    #[arg(long, value_enum)]
    plain_credentials: Option<Plain>,
    /// AWS region
    #[arg(long)]
    region: Option<String>,
    /// A label that runners must have; may be repeated, and replaces those before
    #[arg(long = "runner-label", value_name = "NAME=VALUE", value_parser = parse_label)]
    runner_labels: Vec<(String, String)>,
    /// Demand no labels any more
    #[arg(long, conflicts_with = "runner_labels")]
    no_runner_labels: bool,
    /// What executes the jobs: terraform or tofu; '' takes the runner's own
    #[arg(long, value_name = "NAME", value_parser = ["terraform", "tofu", ""], hide_possible_values = true)]
    engine: Option<String>,
    /// Exact version of the engine for plans, such as 1.9.0; '' takes the runner's own. An apply
    /// uses what made its plan
    #[arg(long, value_name = "VERSION")]
    engine_version: Option<String>,
    #[command(flatten)]
    approval: Approval,
    #[command(flatten)]
    roles: RoleFlags,
    /// The least life that credentials must have when a phase starts, such as 20m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    session_floor: Option<prost_types::Duration>,
    #[command(flatten)]
    limits: LimitFlags,
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Policy {
    /// No code is required
    Never,
    /// Applies require a code. Plan code runs with credentials and without one
    AppliesOnly,
    /// Plans and applies require a code each
    PlansAndApplies,
}

impl From<Policy> for v1::MfaPolicy {
    fn from(policy: Policy) -> v1::MfaPolicy {
        match policy {
            Policy::Never => v1::MfaPolicy::Never,
            Policy::AppliesOnly => v1::MfaPolicy::AppliesOnly,
            Policy::PlansAndApplies => v1::MfaPolicy::PlansAndApplies,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Plain {
    /// A session without MFA, of the organization's keys; AWS refuses IAM calls with it
    Session,
    /// The phase's role, assumed with the organization's keys
    Role,
    /// The organization's long-term keys themselves: they leave the control plane
    Static,
    /// No credentials
    None,
}

impl From<Plain> for v1::PlainCredentials {
    fn from(plain: Plain) -> v1::PlainCredentials {
        match plain {
            Plain::Session => v1::PlainCredentials::Session,
            Plain::Role => v1::PlainCredentials::Role,
            Plain::Static => v1::PlainCredentials::Static,
            Plain::None => v1::PlainCredentials::None,
        }
    }
}

impl Env {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        if let Env::Doctor(doctor) = self {
            return doctor.run(context).await;
        }
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        let environment = match self {
            Env::Doctor(_) => return Ok(Exit::Ok),
            Env::Create { environment, settings } => {
                let request = settings.create(organization, environment);
                change::make(context, client, Ask::WhenNeeded, |token_code, request_id| {
                    let mut request =
                        v1::CreateEnvironmentRequest { token_code, ..request.clone() };
                    // A code's own: what becomes of it is recorded under it.
                    if !request_id.is_empty() {
                        request.request_id = request_id;
                    }
                    let mut service = client.environments();
                    async move { service.create_environment(request).await }
                })
                .await?
                .environment
            }
            Env::Show { environment } => {
                let request = v1::GetEnvironmentRequest { organization, environment };
                client
                    .call(|| {
                        let (mut service, request) = (client.environments(), request.clone());
                        async move { service.get_environment(request).await }
                    })
                    .await?
                    .environment
            }
            Env::Set { environment, settings, with_code } => {
                let request = settings.update(organization, environment)?;
                let ask = if with_code { Ask::First } else { Ask::WhenNeeded };
                change::make(context, client, ask, |token_code, request_id| {
                    let request = request.clone();
                    let request =
                        v1::UpdateEnvironmentRequest { token_code, request_id, ..request };
                    let mut service = client.environments();
                    async move { service.update_environment(request).await }
                })
                .await?
                .environment
            }
            Env::Lock { environment, reason } => {
                let request = v1::LockEnvironmentRequest { organization, environment, reason };
                client
                    .call(|| {
                        let (mut service, request) = (client.environments(), request.clone());
                        async move { service.lock_environment(request).await }
                    })
                    .await?
                    .environment
            }
            Env::Unlock { environment } => {
                let request = v1::UnlockEnvironmentRequest { organization, environment };
                client
                    .call(|| {
                        let (mut service, request) = (client.environments(), request.clone());
                        async move { service.unlock_environment(request).await }
                    })
                    .await?
                    .environment
            }
            Env::Unfreeze { environment, run } => {
                let request =
                    v1::UnfreezeEnvironmentRequest { organization, environment, run_id: run };
                client
                    .call(|| {
                        let (mut service, request) = (client.environments(), request.clone());
                        async move { service.unfreeze_environment(request).await }
                    })
                    .await?
                    .environment
            }
            Env::List => {
                let mut request =
                    v1::ListEnvironmentsRequest { organization, ..Default::default() };
                let mut environments = Vec::new();
                loop {
                    let page = client
                        .call(|| {
                            let (mut service, request) = (client.environments(), request.clone());
                            async move { service.list_environments(request).await }
                        })
                        .await?;
                    environments.extend(page.environments.iter().map(EnvironmentView::new));
                    request.page_token = page.next_page_token;
                    if request.page_token.is_empty() {
                        break;
                    }
                }
                let view = EnvironmentListView { environments };
                context.output.data(&view, EnvironmentListView::human)?;
                return Ok(Exit::Ok);
            }
        };
        let view = EnvironmentView::new(&environment.unwrap_or_default());
        context.output.data(&view, EnvironmentView::human)?;
        Ok(Exit::Ok)
    }
}

impl Settings {
    fn create(self, organization: String, environment: String) -> v1::CreateEnvironmentRequest {
        let policy = self.mfa_policy.map(v1::MfaPolicy::from).unwrap_or_default();
        let plain = self.plain_credentials.map(v1::PlainCredentials::from).unwrap_or_default();
        v1::CreateEnvironmentRequest {
            organization,
            environment,
            settings: Some(v1::EnvironmentSettings {
                mfa_policy: policy.into(),
                auto_apply: self.auto_apply.unwrap_or(false),
                working_directory: self.working_directory.unwrap_or_default(),
                pool: self.pool.unwrap_or_default(),
                session_duration: self.session_duration,
                plain_credentials: plain.into(),
                region: self.region.unwrap_or_default(),
                runner_labels: self.runner_labels.into_iter().collect(),
                engine: self.engine.unwrap_or_default(),
                engine_version: self.engine_version.unwrap_or_default(),
                second_person: self.approval.second_person.unwrap_or_default(),
                plan_rule: self.approval.rule(),
                code_credentials: self.roles.code_credentials().unwrap_or_default(),
                roles: self.roles.roles(),
                session_floor: self.session_floor,
                limits: self.limits.limits(),
            }),
            request_id: Uuid::new_v4().to_string(),
            token_code: String::new(),
        }
    }

    fn update(
        self,
        organization: String,
        environment: String,
    ) -> Result<v1::UpdateEnvironmentRequest, Failure> {
        let replaces_labels = self.no_runner_labels || !self.runner_labels.is_empty();
        let request = v1::UpdateEnvironmentRequest {
            mfa_policy: self.mfa_policy.map(|policy| v1::MfaPolicy::from(policy).into()),
            auto_apply: self.auto_apply,
            working_directory: self.working_directory,
            pool: self.pool,
            session_duration: self.session_duration,
            plain_credentials: self
                .plain_credentials
                .map(|plain| v1::PlainCredentials::from(plain).into()),
            region: self.region,
            runner_labels: replaces_labels
                .then(|| v1::RunnerLabels { labels: self.runner_labels.into_iter().collect() }),
            engine: self.engine,
            engine_version: self.engine_version,
            second_person: self.approval.second_person,
            plan_rule: self.approval.rule(),
            code_credentials: self.roles.code_credentials(),
            roles: self.roles.roles(),
            session_floor: self.session_floor,
            limits: self.limits.limits(),
            ..Default::default()
        };
        if request == v1::UpdateEnvironmentRequest::default() {
            return Err(Failure::Usage {
                message: "no setting is named".into(),
                hint: "`latchkey env set --help` lists them".into(),
            });
        }
        Ok(v1::UpdateEnvironmentRequest { organization, environment, ..request })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn update(args: &[&str]) -> v1::UpdateEnvironmentRequest {
        let line = Line::try_parse_from([&["set"], args].concat()).unwrap();
        line.settings.update("acme".into(), "web".into()).unwrap()
    }

    #[test]
    fn labels_replace_those_before_and_can_be_taken_away() {
        let set = update(&["--runner-label", "gpu=yes", "--runner-label", "zone=a"]);
        assert_eq!(set.runner_labels.unwrap().labels.len(), 2);
        let none = update(&["--no-runner-labels"]);
        assert!(none.runner_labels.unwrap().labels.is_empty());
        assert!(update(&["--region", "eu-central-1"]).runner_labels.is_none());
        assert!(Line::try_parse_from(["set", "--runner-label", "gpu"]).is_err());
    }

    #[test]
    fn an_engine_is_named_or_taken_back() {
        let set = update(&["--engine", "tofu", "--engine-version", "1.9.0"]);
        assert_eq!(
            (set.engine.as_deref(), set.engine_version.as_deref()),
            (Some("tofu"), Some("1.9.0"))
        );
        assert_eq!(update(&["--engine", ""]).engine.as_deref(), Some(""));
        assert!(Line::try_parse_from(["set", "--engine", "pulumi"]).is_err());
    }
}

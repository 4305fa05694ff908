//! `var`: variables, whose values come by a hidden prompt or standard input.

use clap::{Args, Subcommand};
use secrecy::{ExposeSecret, SecretString};

use latchkey_proto::v1;
use latchkey_proto::v1::VariableCategory;
use latchkey_proto::v1::variable_scope::Scope;

use crate::Done;
use crate::change::{self, Ask};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::input::Question;
use crate::log_view::clean;
use crate::view::environment::{EffectiveListView, VariableListView, VariableView};

const SECRET_KEY: &str = "AWS_SECRET_ACCESS_KEY";
const TRIPLE: [&str; 3] = ["AWS_ACCESS_KEY_ID", SECRET_KEY, "AWS_MFA_SERIAL_NUMBER"];

#[derive(Debug, Subcommand)]
pub(crate) enum Var {
    /// Sets a variable
    ///
    /// The value is asked for by a hidden prompt, or is the whole of standard input without its
    /// last line end. AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_MFA_SERIAL_NUMBER, set with
    /// --env-var and --personal or --organization-wide, are the keys and the device that token
    /// codes are used with. To replace them takes a code of the device before, which is asked for;
    /// set the access key first: the secret key of the old one goes with it.
    Set {
        /// Name of the variable
        name: String,
        #[command(flatten)]
        scope: Where,
        /// An environment variable of terraform rather than a Terraform variable
        #[arg(long)]
        env_var: bool,
        /// The value is an HCL expression rather than a string
        #[arg(long, conflicts_with = "env_var")]
        hcl: bool,
        /// Never show the value again
        #[arg(long)]
        sensitive: bool,
        /// The value, when it is no secret
        #[arg(long, conflicts_with = "sensitive", allow_hyphen_values = true)]
        value: Option<String>,
    },
    /// Lists variables; values of sensitive ones are never shown
    List {
        #[command(flatten)]
        scope: Where,
        /// All that a run in the environment would get if you queued it now, wherever it comes
        /// from: organization, environment, personal. A later one wins, and one that is given to
        /// `queue` wins over all
        #[arg(long, conflicts_with_all = ["organization_wide", "personal"])]
        effective: bool,
    },
    /// Deletes a variable
    Delete {
        /// Name of the variable
        name: String,
        #[command(flatten)]
        scope: Where,
        /// The environment variable of that name rather than the Terraform variable
        #[arg(long)]
        env_var: bool,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Where {
    /// Of one environment
    #[arg(long, value_name = "ENV")]
    environment: Option<String>,
    /// Of all environments of the organization; owners only
    #[arg(long)]
    organization_wide: bool,
    /// Your own, used in runs that you queue or authenticate; nobody else sees them
    #[arg(long)]
    personal: bool,
}

impl Where {
    fn scope(self, organization: String) -> v1::VariableScope {
        let scope = match (self.environment, self.organization_wide) {
            (Some(environment), _) => Scope::Environment(environment),
            (None, true) => Scope::WholeOrganization(true),
            (None, false) => Scope::Personal(true),
        };
        v1::VariableScope { organization, scope: Some(scope) }
    }
}

fn category(env_var: bool) -> VariableCategory {
    if env_var { VariableCategory::Environment } else { VariableCategory::Terraform }
}

impl Var {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            Var::Set { name, scope, env_var, hcl, sensitive, value } => {
                check_name(&name, env_var, value.is_some())?;
                let value = match value {
                    Some(value) => SecretString::from(value),
                    None => {
                        let question = Question::Everything(format!("Value of {name}: "));
                        context.input.answer(question).await?
                    }
                };
                let scope = scope.scope(organization);
                let set = |token_code, request_id| {
                    let mut service = client.variables();
                    let request = v1::SetVariableRequest {
                        scope: Some(scope.clone()),
                        name: name.clone(),
                        category: category(env_var).into(),
                        value: value.expose_secret().to_owned(),
                        sensitive,
                        hcl,
                        token_code,
                        request_id,
                    };
                    async move { service.set_variable(request).await }
                };
                let answer = change::make(context, client, Ask::WhenNeeded, set).await?;
                let view = VariableView::new(&answer.variable.unwrap_or_default());
                context.output.data(&view, VariableView::human)?;
            }
            Var::List { scope, effective: true } => {
                let request = v1::GetEffectiveVariablesRequest {
                    organization,
                    environment: scope.environment.unwrap_or_default(),
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.variables(), request.clone());
                        async move { service.get_effective_variables(request).await }
                    })
                    .await?;
                let view = EffectiveListView::new(&answer.variables);
                context.output.data(&view, EffectiveListView::human)?;
            }
            Var::List { scope, effective: false } => {
                let mut request = v1::ListVariablesRequest {
                    scope: Some(scope.scope(organization)),
                    ..Default::default()
                };
                let mut variables = Vec::new();
                loop {
                    let page = client
                        .call(|| {
                            let (mut service, request) = (client.variables(), request.clone());
                            async move { service.list_variables(request).await }
                        })
                        .await?;
                    variables.extend(page.variables.iter().map(VariableView::new));
                    request.page_token = page.next_page_token;
                    if request.page_token.is_empty() {
                        break;
                    }
                }
                context.output.data(&VariableListView { variables }, VariableListView::human)?;
            }
            Var::Delete { name, scope, env_var } => {
                let scope = scope.scope(organization);
                let delete = |token_code, request_id| {
                    let mut service = client.variables();
                    let request = v1::DeleteVariableRequest {
                        scope: Some(scope.clone()),
                        name: name.clone(),
                        category: category(env_var).into(),
                        token_code,
                        request_id,
                    };
                    async move { service.delete_variable(request).await }
                };
                change::make(context, client, Ask::WhenNeeded, delete).await?;
                let view = serde_json::json!({ "name": name, "deleted": true });
                context.output.data(&view, |_| format!("Deleted {}\n", clean(&name)))?;
            }
        }
        Ok(Exit::Ok)
    }
}

/// Catches the two slips that would put a key where it does not belong.
fn check_name(name: &str, env_var: bool, has_value: bool) -> Result<(), Failure> {
    if TRIPLE.contains(&name) && !env_var {
        return Err(Failure::Usage {
            message: format!("{name} is an environment variable"),
            hint: "add --env-var".into(),
        });
    }
    if name == SECRET_KEY && has_value {
        return Err(Failure::Usage {
            message: format!("{SECRET_KEY} must not be given on the command line"),
            hint: "leave --value out; it is asked for, or read from standard input".into(),
        });
    }
    Ok(())
}

//! The commands, one per file: a struct whose comments are its help, and a `run`.

mod audit;
mod authenticate;
mod cancel;
mod completions;
mod confirm;
mod discard;
mod env;
mod login;
mod logout;
mod logs;
mod mail;
mod member;
mod org;
mod password;
mod pool;
mod quarantine;
mod queue;
mod retry;
mod run;
mod runner;
mod service_token;
mod session;
mod state;
mod top_up;
mod user;
mod var;
mod webhook;
mod whoami;

use clap::Subcommand;

use crate::Done;
use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Login(login::Login),
    Logout(logout::Logout),
    Whoami(whoami::WhoAmI),
    Password(password::Password),
    /// Your own sign-ins with a password
    #[command(subcommand)]
    Session(session::Session),
    Queue(Box<queue::Queue>),
    Retry(Box<retry::Retry>),
    Authenticate(authenticate::Authenticate),
    TopUp(top_up::TopUp),
    Confirm(confirm::Confirm),
    Discard(discard::Discard),
    Cancel(cancel::Cancel),
    Logs(logs::Logs),
    /// Lists, shows and follows runs
    #[command(subcommand)]
    Run(run::Run),
    /// Environments and their settings
    #[command(subcommand)]
    Env(Box<env::Env>),
    /// Variables of environments, of the organization and your own
    #[command(subcommand)]
    Var(var::Var),
    /// The organization's settings
    #[command(subcommand)]
    Org(org::Org),
    /// People
    #[command(subcommand)]
    User(user::User),
    /// Who belongs to the organization, and what they may do in it
    #[command(subcommand)]
    Member(member::Member),
    /// Tokens for programs
    #[command(subcommand)]
    ServiceToken(service_token::ServiceToken),
    /// Build hosts
    #[command(subcommand)]
    Runner(runner::Runner),
    /// Pools of build hosts
    #[command(subcommand)]
    Pool(pool::Pool),
    /// What runners brought that is not current, kept for a person
    ///
    /// An organization's is bounded: 10,000 things, and 64 GiB, or 128 GiB where they are states and
    /// results. When that is reached, the oldest log, workspace or list of changes gives way to what
    /// is new. States and results are dropped by a person only: where nothing else is left, runners
    /// keep what they have until there is room, and the audit trail says `quarantine_full`.
    #[command(subcommand)]
    Quarantine(quarantine::Quarantine),
    /// Programs that are told when a run needs somebody or ends
    #[command(subcommand)]
    Webhook(webhook::Webhook),
    /// People who are told by mail when a run needs somebody or ends
    #[command(subcommand)]
    Mail(mail::Mail),
    /// Versions of an environment's state, its lock, and how a workstation uses it
    #[command(subcommand)]
    State(state::State),
    /// The chained record of who did what
    #[command(subcommand)]
    Audit(audit::Audit),
    Completions(completions::Completions),
}

impl Command {
    /// Tells whether the command follows a run, and takes Ctrl-C as leave to detach.
    pub(crate) fn follows(&self) -> bool {
        match self {
            Command::Queue(command) => command.follows(),
            Command::Retry(command) => command.follows(),
            Command::Logs(command) => command.follows(),
            Command::Run(command) => command.follows(),
            Command::Login(_)
            | Command::Logout(_)
            | Command::Whoami(_)
            | Command::Password(_)
            | Command::Session(_)
            | Command::Authenticate(_)
            | Command::TopUp(_)
            | Command::Confirm(_)
            | Command::Discard(_)
            | Command::Cancel(_)
            | Command::Env(_)
            | Command::Var(_)
            | Command::Org(_)
            | Command::User(_)
            | Command::Member(_)
            | Command::ServiceToken(_)
            | Command::Runner(_)
            | Command::Pool(_)
            | Command::Quarantine(_)
            | Command::Webhook(_)
            | Command::Mail(_)
            | Command::State(_)
            | Command::Audit(_)
            | Command::Completions(_) => false,
        }
    }

    pub(crate) async fn run(self, context: &mut Context) -> Done {
        match self {
            Command::Login(command) => command.run(context).await,
            Command::Logout(command) => command.run(context).await,
            Command::Whoami(command) => command.run(context).await,
            Command::Password(command) => command.run(context).await,
            Command::Session(command) => command.run(context).await,
            Command::Queue(command) => command.run(context).await,
            Command::Retry(command) => command.run(context).await,
            Command::Authenticate(command) => command.run(context).await,
            Command::TopUp(command) => command.run(context).await,
            Command::Confirm(command) => command.run(context).await,
            Command::Discard(command) => command.run(context).await,
            Command::Cancel(command) => command.run(context).await,
            Command::Logs(command) => command.run(context).await,
            Command::Run(command) => command.run(context).await,
            Command::Env(command) => command.run(context).await,
            Command::Var(command) => command.run(context).await,
            Command::Org(command) => command.run(context).await,
            Command::User(command) => command.run(context).await,
            Command::Member(command) => command.run(context).await,
            Command::ServiceToken(command) => command.run(context).await,
            Command::Runner(command) => command.run(context).await,
            Command::Pool(command) => command.run(context).await,
            Command::Quarantine(command) => command.run(context).await,
            Command::Webhook(command) => command.run(context).await,
            Command::Mail(command) => command.run(context).await,
            Command::State(command) => command.run(context).await,
            Command::Audit(command) => command.run(context).await,
            Command::Completions(command) => command.run(context),
        }
    }
}

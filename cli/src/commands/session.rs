//! `session`: your own sign-ins with a password.

use clap::Subcommand;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::member::{EndedView, SessionListView, SessionView};

#[derive(Debug, Subcommand)]
pub(crate) enum Session {
    /// Lists your sessions, newest first
    List,
    /// Ends one of your sessions, with what it has open
    Revoke {
        /// Id of the session, as `session list` shows it
        session: String,
    },
}

impl Session {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        match self {
            Session::List => {
                let answer = client
                    .call(|| {
                        let mut service = client.sessions();
                        async move { service.list_sessions(v1::ListSessionsRequest {}).await }
                    })
                    .await?;
                let sessions = answer.sessions.iter().map(SessionView::new).collect();
                context.output.data(&SessionListView { sessions }, SessionListView::human)?;
            }
            Session::Revoke { session } => {
                let request = v1::RevokeSessionRequest { session_id: session.clone() };
                client.once(client.sessions().revoke_session(request).await)?;
                let human = |view: &EndedView| format!("Ended the session {}\n", view.name);
                context.output.data(&EndedView { name: session }, human)?;
            }
        }
        Ok(Exit::Ok)
    }
}

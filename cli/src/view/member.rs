//! Members and tokens of an organization, and a person's own sessions, as programs and people see
//! them.

use std::collections::BTreeMap;

use serde::Serialize;

use latchkey_proto::v1;

use crate::log_view::clean;
use crate::output::{fields, table};
use crate::words::{Word, human_time, time};

#[derive(Debug, Serialize)]
pub(crate) struct MemberView {
    user: String,
    role: String,
    access: String,
    environments: BTreeMap<String, String>,
    create_time: Option<String>,
    #[serde(skip)]
    human_time: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct MemberListView {
    pub(crate) members: Vec<MemberView>,
}

impl MemberView {
    pub(crate) fn new(member: &v1::Member) -> MemberView {
        MemberView {
            user: member.user.clone(),
            role: member.role().snake(),
            access: member.access().snake(),
            environments: member
                .environments
                .iter()
                .map(|entry| (entry.environment.clone(), entry.access().snake()))
                .collect(),
            create_time: time(member.create_time.as_ref()),
            human_time: human_time(member.create_time.as_ref()),
        }
    }

    /// Owners may do everything, whatever else is written.
    fn told(&self) -> (String, String) {
        if self.role == v1::Role::Owner.snake() {
            return ("everything".to_owned(), String::new());
        }
        let environments: Vec<String> = self
            .environments
            .iter()
            .map(|(environment, access)| format!("{environment}={access}"))
            .collect();
        (self.access.clone(), environments.join(" "))
    }

    pub(crate) fn human(&self) -> String {
        let (access, environments) = self.told();
        let mut text = format!("Member {}\n", clean(&self.user));
        text.push_str(&fields(&[
            ("role", self.role.clone()),
            ("access", access),
            ("environments", environments),
            ("since", self.human_time.clone()),
        ]));
        text
    }
}

impl MemberListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .members
            .iter()
            .map(|member| {
                let (access, environments) = member.told();
                vec![
                    member.user.clone(),
                    member.role.clone(),
                    access,
                    environments,
                    member.human_time.clone(),
                ]
            })
            .collect();
        table(&["USER", "ROLE", "ACCESS", "ENVIRONMENTS", "SINCE"], rows, "no members")
    }
}

/// What was done to something that is no more.
#[derive(Debug, Serialize)]
pub(crate) struct EndedView {
    pub(crate) name: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct ServiceTokenView {
    name: String,
    access: String,
    /// None: all.
    environments: Vec<String>,
    creator: String,
    create_time: Option<String>,
    expire_time: Option<String>,
    #[serde(skip)]
    human_expiry: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct ServiceTokenListView {
    pub(crate) service_tokens: Vec<ServiceTokenView>,
}

impl ServiceTokenView {
    pub(crate) fn new(token: &v1::ServiceToken) -> ServiceTokenView {
        ServiceTokenView {
            name: token.name.clone(),
            access: token.access().snake(),
            environments: token.environments.clone(),
            creator: token.creator.clone(),
            create_time: time(token.create_time.as_ref()),
            expire_time: time(token.expire_time.as_ref()),
            human_expiry: human_time(token.expire_time.as_ref()),
        }
    }
}

impl ServiceTokenListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .service_tokens
            .iter()
            .map(|token| {
                let environments = match token.environments.join(" ") {
                    all if all.is_empty() => "all".to_owned(),
                    some => some,
                };
                vec![
                    token.name.clone(),
                    token.access.clone(),
                    environments,
                    token.creator.clone(),
                    token.human_expiry.clone(),
                ]
            })
            .collect();
        let names = ["NAME", "ACCESS", "ENVIRONMENTS", "CREATOR", "EXPIRES"];
        table(&names, rows, "no service tokens")
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct SessionView {
    session_id: String,
    client: String,
    create_time: Option<String>,
    expire_time: Option<String>,
    /// To the hour.
    last_use_time: Option<String>,
    current: bool,
    #[serde(skip)]
    human: [String; 3],
}

#[derive(Debug, Serialize)]
pub(crate) struct SessionListView {
    pub(crate) sessions: Vec<SessionView>,
}

impl SessionView {
    pub(crate) fn new(session: &v1::Session) -> SessionView {
        let (create, expire) = (session.create_time.as_ref(), session.expire_time.as_ref());
        let last_use = session.last_use_time.as_ref();
        SessionView {
            session_id: session.session_id.clone(),
            client: session.client.clone(),
            create_time: time(create),
            expire_time: time(expire),
            last_use_time: time(last_use),
            current: session.current,
            human: [human_time(create), human_time(last_use), human_time(expire)],
        }
    }
}

impl SessionListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .sessions
            .iter()
            .map(|session| {
                let current = if session.current { "this one" } else { "" };
                let [since, used, expires] = session.human.clone();
                let (id, client) = (session.session_id.clone(), session.client.clone());
                vec![id, client, since, used, expires, current.to_owned()]
            })
            .collect();
        let names = ["SESSION", "CLIENT", "SINCE", "LAST USE (HOUR)", "EXPIRES", "CURRENT"];
        table(&names, rows, "no sessions")
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct PasswordView {
    ended_sessions: u32,
}

impl PasswordView {
    pub(crate) fn new(answer: &v1::SetPasswordResponse) -> PasswordView {
        PasswordView { ended_sessions: answer.ended_sessions }
    }

    pub(crate) fn human(&self) -> String {
        let ended = match self.ended_sessions {
            0 => String::new(),
            1 => "; another session was ended".to_owned(),
            many => format!("; {many} other sessions were ended"),
        };
        format!("The password is set{ended}\n")
    }
}

//! Carries a notice to a person: one message over SMTP to the operator's server.
//!
//! Headers hold our words, names that have only `[a-z0-9-]`, and addresses that [`address`] took;
//! what people wrote stands in the body alone. So nothing that anybody types can become a header
//! or a recipient.

mod server;

use std::fmt;
use std::time::{Duration, UNIX_EPOCH};

use latchkey_domain::id::DeliveryId;
use latchkey_domain::time::Timestamp;
use lettre::Address;
use lettre::message::header::{ContentType, Header, HeaderName, HeaderValue};
use lettre::message::{Mailbox, Message};
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::AsyncSmtpConnection;
use lettre::transport::smtp::response::Response;
use rustls::ClientConfig;
use secrecy::ExposeSecret;
use tokio::time::timeout;

use self::server::Server;
use super::options::MailOptions;
use super::{Attempt, short, webhook};
use crate::error::rfc3339;
use crate::store::record::notice::{Event, Notice};

/// All of an attempt, but for the good-bye.
pub const TOTAL: Duration = Duration::from_secs(60);

/// What a good-bye may take, once the mail is taken.
const GOODBYE: Duration = Duration::from_secs(2);

/// The operator's server, and whom mail comes from.
pub struct Mailer {
    server: Server,
    credentials: Option<Credentials>,
    from: Mailbox,
}

impl fmt::Debug for Mailer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailer").field("from", &self.from).finish_non_exhaustive()
    }
}

impl Mailer {
    /// Prepares a mailer; connections are made for each message.
    pub fn open(options: &MailOptions, tls: ClientConfig) -> Result<Self, super::options::Error> {
        let credentials = options.credentials.as_ref().map(|(user, password)| {
            Credentials::new(user.clone(), password.expose_secret().to_owned())
        });
        let server = Server::new(options, tls)?;
        Ok(Self { server, credentials, from: options.from.clone() })
    }

    /// Delivers a notice, once.
    pub async fn deliver(
        &self,
        to: &str,
        (delivery, notice): (DeliveryId, &Notice),
        public_url: Option<&str>,
    ) -> Attempt {
        let Some(to) = address(to) else { return Attempt::failed("it is no plain address") };
        let message = match message(&self.from, to, (delivery, notice), public_url) {
            Ok(message) => message,
            Err(error) => return Attempt::failed(format!("no message can be made: {error}")),
        };
        match timeout(TOTAL, self.send(&message)).await {
            Ok(Ok((answer, mut connection))) => {
                let code = u16::from(answer.code());
                // Whatever becomes of this, the mail is taken.
                let _ = timeout(GOODBYE, connection.quit()).await;
                Attempt {
                    accepted: (200..300).contains(&code),
                    status: Some(code),
                    detail: short(&answer.message().collect::<Vec<_>>().join(" ")),
                }
            }
            Ok(Err(attempt)) => attempt,
            Err(_) => Attempt::failed("the server did not take the mail within a minute"),
        }
    }

    async fn send(&self, message: &Message) -> Result<(Response, AsyncSmtpConnection), Attempt> {
        let mut connection = self.server.connect().await?;
        if let Some(credentials) = &self.credentials {
            let ways = [Mechanism::Plain, Mechanism::Login];
            connection.auth(&ways, credentials).await.map_err(failed)?;
        }
        let sent = connection.send(message.envelope(), &message.formatted()).await;
        Ok((sent.map_err(failed)?, connection))
    }
}

/// Says all that an error knows.
pub(super) fn failed(error: lettre::transport::smtp::Error) -> Attempt {
    let status = error.status().map(u16::from);
    let mut said = error.to_string();
    let mut link = std::error::Error::source(&error);
    while let Some(source) = link {
        said = format!("{said}: {source}");
        link = source.source();
    }
    Attempt { status, ..Attempt::failed(said) }
}

/// Reads a plain ASCII address of the usual form, and nothing that could be more than one.
pub fn address(text: &str) -> Option<Address> {
    let (user, domain) = text.split_once('@')?;
    let atom = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+/=?^_`{|}~-.".contains(&byte);
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let dots = user.starts_with('.') || user.ends_with('.') || user.contains("..");
    let fits = (1..=64).contains(&user.len()) && text.len() <= 254;
    if !fits || dots || !user.bytes().all(atom) || !domain.split('.').all(label) {
        return None;
    }
    Address::new(user, domain).ok()
}

/// Asks programs not to answer: two of them would not stop.
#[derive(Clone)]
struct AutoSubmitted;

impl Header for AutoSubmitted {
    fn name() -> HeaderName {
        HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> HeaderValue {
        HeaderValue::new(Self::name(), "auto-generated".into())
    }
}

fn message(
    from: &Mailbox,
    to: Address,
    (delivery, notice): (DeliveryId, &Notice),
    public_url: Option<&str>,
) -> Result<Message, lettre::error::Error> {
    let millis = u64::try_from(Timestamp::from(notice.at).as_millis()).unwrap_or(0);
    Message::builder()
        .from(from.clone())
        .to(Mailbox::new(None, to))
        .subject(subject(notice))
        .date(UNIX_EPOCH + Duration::from_millis(millis))
        // The same for all attempts: a repeat is recognised.
        .message_id(Some(format!("<{delivery}@{}>", from.email.domain())))
        .header(AutoSubmitted)
        .header(ContentType::TEXT_PLAIN)
        .body(text(notice, public_url))
}

fn sentence(event: Event) -> &'static str {
    match event {
        Event::WaitingForCode => "a run waits for a token code",
        Event::NeedsConfirmation => "a plan waits for a confirmation",
        Event::Applied => "a run was applied",
        Event::Errored => "a run ended with an error",
        Event::RunnerLost => "a runner was lost during an apply; a person decides",
        Event::EnvironmentFrozen => "the environment is frozen until a person looks at it",
        Event::BreakGlass => "a policy was broken open on the control plane's host",
        Event::Test => "a test",
    }
}

fn subject(notice: &Notice) -> String {
    let place = match &notice.environment {
        Some(environment) => format!("{}/{environment}", notice.organization),
        None => notice.organization.clone(),
    };
    let subject = format!("[latchkey] {place}: {}", sentence(notice.event));
    subject.chars().filter(|c| matches!(c, ' '..='~')).collect()
}

fn text(notice: &Notice, public_url: Option<&str>) -> String {
    let mut lines = vec![format!("{}.", subject(notice)), String::new()];
    let mut tell = |name: &str, value: &str| {
        let value: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if !value.is_empty() {
            lines.push(format!("{name:<12} {value}"));
        }
    };
    tell("time", &rfc3339(notice.at.into()));
    if let Some(run) = &notice.run {
        tell("run", &run.id.0.to_string());
        tell("kind", &run.kind);
        tell("state", &run.state);
        tell("queued by", &run.queued_by);
        tell("message", &run.message);
    }
    tell("reason", notice.reason.as_deref().unwrap_or_default());
    if let Some(run) = &notice.run {
        tell("page", &webhook::link(run, public_url).unwrap_or_default());
        tell("look", &format!("latchkey run show {}", run.id.0));
    }
    lines.join("\r\n") + "\r\n"
}

#[cfg(test)]
mod tests {
    use latchkey_domain::id::RunId;

    use super::*;
    use crate::store::record::Text;
    use crate::store::record::notice::RunFacts;

    #[test]
    fn an_address_is_one_plain_address() {
        for good in ["ops@example.com", "a.b+c@x-y.example", "root@localhost"] {
            assert!(address(good).is_some(), "{good}");
        }
        let bad = [
            "",
            "@example.com",
            "ops@",
            "ops",
            "a@b@c",
            "a b@example.com",
            "a@example.com,b@example.com",
            "a@example.com\r\nBcc: b@example.com",
            "a\n@example.com",
            "\"a b\"@example.com",
            "<a@example.com>",
            "a@exam_ple.com",
            "a@-example.com",
            ".a@example.com",
            "ä@example.com",
            "a@example.com ",
        ];
        for bad in bad {
            assert!(address(bad).is_none(), "{bad:?}");
        }
        assert!(address(&format!("{}@example.com", "a".repeat(65))).is_none());
    }

    #[test]
    fn nothing_that_people_write_becomes_a_header() {
        let evil = "x\r\nBcc: eve@example.com\r\n\r\n.\r\nMAIL FROM:<eve@example.com>";
        let notice = Notice {
            event: Event::Errored,
            at: Timestamp::from_millis(1_700_000_000_000).into(),
            organization: evil.into(),
            environment: Some(evil.into()),
            run: Some(RunFacts {
                id: Text(RunId::from_bytes([1; 16])),
                kind: evil.into(),
                state: evil.into(),
                message: evil.into(),
                queued_by: evil.into(),
            }),
            reason: Some(evil.into()),
        };
        let from = Mailbox::new(None, address("latchkey@example.com").unwrap());
        let to = address("ops@example.com").unwrap();
        let delivery = DeliveryId::from_bytes([2; 16]);
        let made = message(&from, to, (delivery, &notice), Some("https://x")).unwrap();
        let bytes = String::from_utf8(made.formatted()).unwrap();
        let (head, body) = bytes.split_once("\r\n\r\n").unwrap();
        let names: Vec<_> = head
            .split("\r\n")
            .filter(|line| !line.starts_with([' ', '\t']))
            .map(|line| line.split(':').next().unwrap())
            .collect();
        assert!(!names.iter().any(|name| name.eq_ignore_ascii_case("bcc")), "{head}");
        assert!(names.contains(&"Auto-Submitted") && names.contains(&"Message-ID"), "{head}");
        assert!(!body.lines().any(|line| line.starts_with("MAIL FROM") || line == "."), "{body}");
        assert_eq!(made.envelope().to().len(), 1);
    }
}

//! The table of `errors.rs`, row by row, against the simulated AWS, which answers in AWS's own
//! words.

use std::time::Duration;

use jiff::SignedDuration;
use latchkey_aws_simulator::{Clock, Effect, Fault, KeyStatus, Simulator, World};
use secrecy::SecretString;

use super::aws::AwsSts;
use super::{Class, Code, Credentials, Exchange, Identity, RoleWanted, Sts, Triple, Wanted};

const REGION: &str = "us-east-1";
const HOUR: Duration = Duration::from_secs(3600);

struct Row {
    aws: Simulator,
    sts: AwsSts,
    triple: Triple,
}

impl Row {
    async fn new() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let aws = Simulator::start(World::example(), Clock::wall()).await.unwrap();
        let sts = AwsSts::new(Some(aws.url()), false).await;
        let facts = aws.facts();
        let triple = Triple {
            access_key_id: facts.access_key_id,
            secret_access_key: facts.secret_access_key.expose().into(),
            serial: facts.mfa_serial,
        };
        Self { aws, sts, triple }
    }

    fn right_code(&self) -> SecretString {
        self.aws.unused_code(&self.aws.facts().mfa_serial).unwrap().into()
    }

    async fn exchange(&self, code: &SecretString, region: &str, duration: Duration) -> Exchange {
        let wanted = Wanted { region: region.into(), duration, role: None };
        self.spend(code, &wanted).await
    }

    async fn spend(&self, digits: &SecretString, wanted: &Wanted) -> Exchange {
        let code = Code { serial: &self.triple.serial, digits };
        self.sts.exchange(&self.triple.keys(), Some(code), wanted).await
    }

    #[track_caller]
    fn class(exchange: Exchange) -> Class {
        match exchange {
            Exchange::Refused(refused) => {
                assert!(refused.request_id.is_some(), "AWS's request id is kept");
                refused.class
            }
            other => panic!("{other:?}"),
        }
    }

    async fn session(&self) -> Credentials {
        match self.exchange(&self.right_code(), REGION, HOUR).await {
            Exchange::Issued { credentials, .. } => credentials,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_right_code_buys_a_session_that_knows_its_account() {
    let row = Row::new().await;
    let session = row.session().await;
    match row.sts.identify(&session, REGION).await {
        Identity::Account(account) => assert_eq!(account, row.aws.facts().account_id),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_session_without_a_code_is_issued_too() {
    let row = Row::new().await;
    let wanted = Wanted { region: REGION.into(), duration: HOUR, role: None };
    let exchange = row.sts.exchange(&row.triple.keys(), None, &wanted).await;
    assert!(matches!(exchange, Exchange::Issued { .. }), "{exchange:?}");
}

#[tokio::test]
async fn rows_about_codes_and_devices() {
    let mut row = Row::new().await;
    let wrong = SecretString::from("000000");
    assert_eq!(Row::class(row.exchange(&wrong, REGION, HOUR).await), Class::CodeRejected);
    let code = row.right_code();
    let exchange = row.exchange(&code, REGION, HOUR).await;
    assert!(matches!(exchange, Exchange::Issued { .. }));
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::CodeRejected);
    let short = SecretString::from("12345");
    assert_eq!(Row::class(row.exchange(&short, REGION, HOUR).await), Class::OurBug);
    row.triple.serial = "arn:aws:iam::123456789012:mfa/somebody-else".into();
    let code = row.right_code();
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::DeviceRejected);
    row.triple.serial = "not a serial!".into();
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::SerialMalformed);
}

#[tokio::test]
async fn a_spent_device_answers_like_an_unknown_one() {
    let row = Row::new().await;
    for n in 0..9 {
        let wrong = SecretString::from(format!("00000{n}"));
        assert_eq!(Row::class(row.exchange(&wrong, REGION, HOUR).await), Class::CodeRejected);
    }
    let code = row.right_code();
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::DeviceRejected);
}

#[tokio::test]
async fn rows_about_keys() {
    let mut row = Row::new().await;
    let code = row.right_code();
    let key = row.triple.access_key_id.clone();
    row.aws.change_world(|world| world.set_key_status(&key, KeyStatus::Inactive)).unwrap();
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::KeyRejected);
    row.aws.change_world(|world| world.set_key_status(&key, KeyStatus::Active)).unwrap();
    row.triple.secret_access_key = "of somebody else".into();
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::SecretRejected);
    row.triple.access_key_id = "AKIAQNZGKIQYNOSUCHKEY".into();
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::KeyRejected);
}

#[tokio::test]
async fn rows_about_time() {
    for minutes in [20, -20] {
        let row = Row::new().await;
        row.aws.clock().advance(SignedDuration::from_mins(minutes));
        let code = row.right_code();
        assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::ClockSkew);
    }
    let row = Row::new().await;
    let code = row.right_code();
    let short = Duration::from_secs(10);
    assert_eq!(Row::class(row.exchange(&code, REGION, short).await), Class::DurationRefused);
}

#[tokio::test]
async fn rows_about_regions_and_throttling() {
    let row = Row::new().await;
    row.aws.change_world(|world| {
        world.accounts[0].disabled_regions.push("ap-east-1".into());
    });
    let code = row.right_code();
    assert_eq!(Row::class(row.exchange(&code, "ap-east-1", HOUR).await), Class::RegionDisabled);
    row.aws.script(Fault::new(Effect::Throttle));
    assert_eq!(Row::class(row.exchange(&code, REGION, HOUR).await), Class::Throttled);
}

#[tokio::test]
async fn rows_that_only_a_script_can_bring_about() {
    let rows = [
        (
            403,
            "AccessDenied",
            "Cannot call GetSessionToken with session credentials",
            Class::TemporaryKey,
        ),
        (
            403,
            "AccessDenied",
            "User: arn:aws:iam::1:user/x is not authorized to perform: sts:GetSessionToken",
            Class::NotAuthorized,
        ),
        (
            403,
            "AccessDenied",
            "MultiFactorAuthentication failed, must provide both MFA serial number and one time \
             pass code",
            Class::OurBug,
        ),
        (
            403,
            "ExpiredToken",
            "The security token included in the request is expired",
            Class::SessionExpired,
        ),
        (
            403,
            "ExpiredTokenException",
            "The security token included in the request is expired",
            Class::SessionExpired,
        ),
        (
            403,
            "MissingAuthenticationToken",
            "Request is missing Authentication Token",
            Class::OurBug,
        ),
        (400, "ThrottlingException", "Rate exceeded", Class::Throttled),
        (
            400,
            "ValidationError",
            "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
            Class::RoleMaximum,
        ),
        (418, "Teapot", "short and stout", Class::Other),
    ];
    let row = Row::new().await;
    for (status, code, message, class) in rows {
        row.aws.script(Fault::new(Effect::Refuse {
            status,
            code: code.into(),
            message: message.into(),
        }));
        let exchange = row.exchange(&SecretString::from("123456"), REGION, HOUR).await;
        assert_eq!(Row::class(exchange), class, "{code}: {message}");
    }
}

#[tokio::test]
async fn what_tells_nothing_is_unknown_and_is_asked_once() {
    for effect in [Effect::ServiceUnavailable, Effect::InternalFailure, Effect::Reset] {
        let row = Row::new().await;
        row.aws.script(Fault::new(effect));
        let code = row.right_code();
        let exchange = row.exchange(&code, REGION, HOUR).await;
        assert!(matches!(exchange, Exchange::Unknown { .. }), "{exchange:?}");
        assert_eq!(row.aws.requests_for("GetSessionToken"), 1);
    }
}

#[tokio::test]
async fn a_closed_port_is_the_proof_that_nothing_was_sent() {
    let row = Row::new().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let sts = AwsSts::new(Some(format!("http://{closed}")), false).await;
    let wanted = Wanted { region: REGION.into(), duration: HOUR, role: None };
    let digits = row.right_code();
    let code = Code { serial: &row.triple.serial, digits: &digits };
    let exchange = sts.exchange(&row.triple.keys(), Some(code), &wanted).await;
    assert!(matches!(exchange, Exchange::NotReached), "{exchange:?}");
}

#[tokio::test]
async fn an_expired_session_is_told_by_the_identity_call() {
    let row = Row::new().await;
    let session = row.session().await;
    row.aws.script(Fault::new(Effect::Refuse {
        status: 403,
        code: "ExpiredToken".into(),
        message: "The security token included in the request is expired".into(),
    }));
    match row.sts.identify(&session, REGION).await {
        Identity::Refused(refused) => assert_eq!(refused.class, Class::SessionExpired),
        other => panic!("{other:?}"),
    }
}

fn role(name: &str) -> RoleWanted {
    RoleWanted {
        arn: format!("arn:aws:iam::123456789012:role/{name}"),
        session_name: "run-1".into(),
        source_identity: Some("ada".into()),
        tags: vec![("phase".into(), "apply".into())],
        external_id: Some("latchkey-1".into()),
        ..RoleWanted::default()
    }
}

fn in_role(duration: Duration, role: RoleWanted) -> Wanted {
    Wanted { region: REGION.into(), duration, role: Some(role) }
}

#[tokio::test]
async fn a_code_buys_a_role_with_all_that_marks_and_narrows_it() {
    let row = Row::new().await;
    let mut wanted = in_role(HOUR, role("deploy"));
    let asked = wanted.role.as_mut().unwrap();
    asked.policy = Some(r#"{"Version":"2012-10-17","Statement":[]}"#.into());
    asked.policy_arns = vec!["arn:aws:iam::aws:policy/ReadOnlyAccess".into()];
    let Exchange::Issued { credentials, packed_percent, .. } =
        row.spend(&row.right_code(), &wanted).await
    else {
        panic!("refused")
    };
    assert!(credentials.expires_at.is_some() && packed_percent.is_some_and(|size| size > 0));
    let calls = row.aws.calls();
    let members = &calls[0].members;
    for (name, value) in [
        ("RoleSessionName", "run-1"),
        ("SourceIdentity", "ada"),
        ("ExternalId", "latchkey-1"),
        ("Tags.member.1.Key", "phase"),
        ("Tags.member.1.Value", "apply"),
        ("PolicyArns.member.1.arn", "arn:aws:iam::aws:policy/ReadOnlyAccess"),
        ("DurationSeconds", "3600"),
    ] {
        assert_eq!(members.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(calls[0].had_code && !members.contains_key("TokenCode"));
}

#[tokio::test]
async fn rows_about_roles() {
    let row = Row::new().await;
    let keys = row.triple.keys();
    let plain = async |wanted: &Wanted| Row::class(row.sts.exchange(&keys, None, wanted).await);
    assert_eq!(plain(&in_role(HOUR, role("deploy"))).await, Class::RoleRefused);
    assert_eq!(plain(&in_role(HOUR, role("no-such-role"))).await, Class::RoleRefused);
    assert_eq!(plain(&in_role(HOUR * 2, role("read"))).await, Class::RoleMaximum);
    let large = "x".repeat(1500);
    let policy = format!(r#"{{"Version":"2012-10-17","Statement":"{large}"}}"#);
    let too_large = RoleWanted { policy: Some(policy), ..role("read") };
    assert_eq!(plain(&in_role(HOUR, too_large)).await, Class::PolicyTooLarge);
    let malformed = RoleWanted { policy: Some("no policy".into()), ..role("read") };
    assert_eq!(plain(&in_role(HOUR, malformed)).await, Class::PolicyMalformed);
    row.aws.change_world(|world| {
        world.accounts[0].roles.iter_mut().for_each(|role| role.max_session_seconds = 43_200);
    });
    let session = row.session().await;
    let chained = row.sts.exchange(&session, None, &in_role(HOUR * 2, role("read"))).await;
    assert_eq!(Row::class(chained), Class::ChainLimit);
    let Exchange::Issued { credentials, .. } =
        row.sts.exchange(&session, None, &in_role(HOUR, role("deploy"))).await
    else {
        panic!("refused")
    };
    let other = RoleWanted { source_identity: Some("eve".into()), ..role("read") };
    let again = row.sts.exchange(&credentials, None, &in_role(HOUR, other)).await;
    assert_eq!(Row::class(again), Class::SourceIdentitySet);
}

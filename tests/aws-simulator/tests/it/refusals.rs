//! The table of AWS's answers, row by row.

use jiff::SignedDuration;
use latchkey_aws_simulator::{
    Account, Clock, KeyStatus, MfaCondition, Role, Simulator, User, World,
};

use crate::support::{ACCOUNT, Client, DEPLOY, READ, SERIAL, USER_ARN, exchange, start};

const INVALID_TOKEN: &str = "The security token included in the request is invalid.";
const WRONG_SIGNATURE: &str = "The request signature we calculated does not match the signature you provided. Check your \
     AWS Secret Access Key and signing method. Consult the service documentation for details.";

#[tokio::test]
async fn half_of_the_mfa_members_is_refused() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    for member in [("SerialNumber", SERIAL), ("TokenCode", "123456")] {
        let answer = user.sts("GetSessionToken", &[member]).await;
        assert_eq!(answer.status, 403);
        assert!(
            answer
                .text("Message")
                .contains("provide both MFA serial number and one time pass code")
        );
    }
}

#[tokio::test]
async fn members_outside_their_limits_are_named() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let length = |value: &str, than: &str| {
        format!(
            "Value '{value}' at 'tokenCode' failed to satisfy constraint: Member must have \
             length {than} than or equal to 6"
        )
    };
    let pattern = |value: &str| {
        format!(
            "Value '{value}' at 'tokenCode' failed to satisfy constraint: Member must satisfy \
             regular expression pattern: [\\d]*"
        )
    };
    let mfa = |code: &'static str| vec![("SerialNumber", SERIAL), ("TokenCode", code)];
    for (members, clauses) in [
        (mfa("12345"), vec![length("12345", "greater")]),
        (mfa("1234567"), vec![length("1234567", "less")]),
        (mfa("12345a"), vec![pattern("12345a")]),
        (mfa("12a"), vec![pattern("12a"), length("12a", "greater")]),
        // Digits of other scripts are no digits.
        (mfa("١٢٣٤٥٦"), vec![pattern("١٢٣٤٥٦")]),
        (
            vec![("SerialNumber", "a serial"), ("TokenCode", "123456")],
            vec![
                "Value 'a serial' at 'serialNumber' failed to satisfy constraint: Member must \
                 satisfy regular expression pattern: [\\w+=/:,.@-]*"
                    .to_owned(),
                "Value 'a serial' at 'serialNumber' failed to satisfy constraint: Member must \
                 have length greater than or equal to 9"
                    .to_owned(),
            ],
        ),
        (
            vec![("DurationSeconds", "899")],
            vec![
                "Value '899' at 'durationSeconds' failed to satisfy constraint: Member must have \
                 value greater than or equal to 900"
                    .to_owned(),
            ],
        ),
        (
            vec![("DurationSeconds", "129601")],
            vec![
                "Value '129601' at 'durationSeconds' failed to satisfy constraint: Member must \
                 have value less than or equal to 129600"
                    .to_owned(),
            ],
        ),
    ] {
        let answer = user.sts("GetSessionToken", &members).await;
        let noun = if clauses.len() == 1 { "error" } else { "errors" };
        let message =
            format!("{} validation {noun} detected: {}", clauses.len(), clauses.join("; "));
        answer.assert_refused(400, "ValidationError", &message);
    }
    assert_eq!(simulator.attempts_left(SERIAL), 9, "none of these reached the device");
}

#[tokio::test]
async fn a_role_session_that_is_too_long_is_refused() {
    let simulator = start().await;
    simulator.change_world(|world| {
        let mut long = Role::new("long", MfaCondition::NotDemanded);
        long.max_session_seconds = 43_200;
        world.put_role(ACCOUNT, long).unwrap();
    });
    let long = "arn:aws:iam::123456789012:role/long";
    let user = Client::of(&simulator);
    let assume = async |client: &Client, role: &str, seconds: &str| {
        let members =
            [("RoleArn", role), ("RoleSessionName", "run-1"), ("DurationSeconds", seconds)];
        client.sts("AssumeRole", &members).await
    };
    assume(&user, READ, "3601").await.assert_refused(
        400,
        "ValidationError",
        "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
    );
    assert_eq!(assume(&user, long, "43200").await.status, 200);
    let over = assume(&user, long, "43201").await;
    assert!(over.text("Message").contains("value less than or equal to 43200"));

    let session = user.with_session(&user.sts("GetSessionToken", &[]).await);
    assume(&session, long, "3601").await.assert_refused(
        400,
        "ValidationError",
        "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by \
         role chaining.",
    );
    assert_eq!(assume(&session, long, "3600").await.status, 200);
    // The role's own limit comes first.
    let both = assume(&session, READ, "3601").await;
    assert!(both.text("Message").contains("MaxSessionDuration"));
}

#[tokio::test]
async fn get_session_token_is_for_long_term_keys() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let session = user.with_session(&user.sts("GetSessionToken", &[]).await);
    session.sts("GetSessionToken", &[]).await.assert_refused(
        403,
        "AccessDenied",
        "Cannot call GetSessionToken with session credentials",
    );
}

#[tokio::test]
async fn unknown_inactive_and_misplaced_keys_get_one_answer() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let session = user.with_session(&user.sts("GetSessionToken", &[]).await);
    let unknown = Client { key: "AKIAIOSFODNN7EXAMPLE".to_owned(), ..user.clone() };
    let token_missing = Client { token: None, ..session.clone() };
    let token_wrong = Client { token: Some("IQoJ".to_owned()), ..session.clone() };
    let token_surplus = Client { token: session.token.clone(), ..user.clone() };
    let other_partition = Client { region: "cn-north-1".to_owned(), ..user.clone() };
    for client in [unknown, token_missing, token_wrong, token_surplus, other_partition] {
        let answer = client.sts("GetCallerIdentity", &[]).await;
        answer.assert_refused(403, "InvalidClientTokenId", INVALID_TOKEN);
    }
    simulator.change_world(|world| world.set_key_status(&user.key, KeyStatus::Inactive)).unwrap();
    let answer = user.sts("GetCallerIdentity", &[]).await;
    answer.assert_refused(403, "InvalidClientTokenId", INVALID_TOKEN);
    assert_eq!(session.sts("GetCallerIdentity", &[]).await.status, 200);
}

#[tokio::test]
async fn a_wrong_secret_or_a_changed_body_does_not_match() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let wrong = Client { secret: "wrong".to_owned(), ..user.clone() };
    let answer = wrong.session(&simulator.code(SERIAL, 0).unwrap()).await;
    answer.assert_refused(403, "SignatureDoesNotMatch", WRONG_SIGNATURE);
    assert_eq!(simulator.attempts_left(SERIAL), 9);
    // Signed for another service.
    let other = user.send("ec2", "POST", "/", &[], b"Action=GetCallerIdentity").await.unwrap();
    assert_eq!(other.text("Code"), "SignatureDoesNotMatch");
    assert!(other.text("Message").contains("correct service: 'sts'"));
}

#[tokio::test]
async fn a_clock_that_is_off_is_told_by_how_much() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    user.off_by(-16).sts("GetCallerIdentity", &[]).await.assert_refused(
        403,
        "SignatureDoesNotMatch",
        "Signature expired: 20270115T074400Z is now earlier than 20270115T074500Z \
         (20270115T080000Z - 15 min.)",
    );
    user.off_by(16).sts("GetCallerIdentity", &[]).await.assert_refused(
        403,
        "SignatureDoesNotMatch",
        "Signature not yet current: 20270115T081600Z is still later than 20270115T081500Z \
         (20270115T080000Z + 15 min.)",
    );
    assert_eq!(user.off_by(-15).sts("GetCallerIdentity", &[]).await.status, 200);
    assert_eq!(user.off_by(15).sts("GetCallerIdentity", &[]).await.status, 200);
}

#[tokio::test]
async fn a_session_ends_when_it_said_it_would() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let short = user.sts("GetSessionToken", &[("DurationSeconds", "900")]).await;
    assert_eq!(short.text("Expiration"), "2027-01-15T08:15:00Z");
    simulator.clock().advance(SignedDuration::from_secs(900));
    let late = Client { now: simulator.clock().now(), ..user.with_session(&short) };
    for answer in [late.sts("GetCallerIdentity", &[]).await, late.assume(READ).await] {
        answer.assert_refused(
            403,
            "ExpiredToken",
            "The security token included in the request is expired",
        );
    }
}

#[tokio::test]
async fn a_region_that_is_off_names_the_account() {
    let mut world = World::example();
    world.accounts[0].disabled_regions.push("af-south-1".to_owned());
    let simulator = Simulator::start(world, Clock::wall()).await.unwrap();
    let user = Client { region: "af-south-1".to_owned(), ..Client::of(&simulator) };
    user.sts("GetSessionToken", &[]).await.assert_refused(
        403,
        "RegionDisabledException",
        "STS is not activated in this region for account:123456789012. Your account administrator \
         can activate STS in this region using the IAM Console.",
    );
}

#[tokio::test]
async fn a_role_that_does_not_trust_the_caller_names_both() {
    let simulator = start().await;
    simulator.change_world(|world| {
        let mut picky = Role::new("picky", MfaCondition::NotDemanded);
        picky.trust.external_id = Some("tenant-1".to_owned());
        world.put_role(ACCOUNT, picky).unwrap();
        world.accounts.push(Account::new("210987654321"));
        let mallory = User::with_key_and_device("aws", "210987654321", "mallory");
        world.add_user("210987654321", mallory).unwrap();
    });
    let user = Client::of(&simulator);
    let picky = "arn:aws:iam::123456789012:role/picky";
    let absent = "arn:aws:iam::123456789012:role/absent";
    for role in [absent, picky] {
        let message = format!(
            "User: {USER_ARN} is not authorized to perform: sts:AssumeRole on resource: {role}"
        );
        user.assume(role).await.assert_refused(403, "AccessDenied", &message);
    }
    let members = [("RoleArn", picky), ("RoleSessionName", "run-1"), ("ExternalId", "tenant-1")];
    assert_eq!(user.sts("AssumeRole", &members).await.status, 200);

    let key = simulator.change_world(|world| world.accounts[1].users[0].access_keys[0].clone());
    let mallory = Client { key: key.id, secret: key.secret.expose().to_owned(), ..user };
    assert_eq!(mallory.assume(READ).await.text("Code"), "AccessDenied");
}

#[tokio::test]
async fn session_policies_are_checked_for_form_and_size() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let with_policy = async |policy: &str| {
        let members = [("RoleArn", READ), ("RoleSessionName", "run-1"), ("Policy", policy)];
        user.sts("AssumeRole", &members).await
    };
    let broken = with_policy("{").await;
    assert_eq!((broken.status, broken.text("Code").as_str()), (400, "MalformedPolicyDocument"));
    let big = format!("{{\"Statement\": \"{}\"}}", "x".repeat(1690 - 17));
    with_policy(&big).await.assert_refused(
        400,
        "PackedPolicyTooLarge",
        "Packed policy consumes 157% of allotted space, please use smaller policy.",
    );
    let huge = format!("{{\"Statement\": \"{}\"}}", "x".repeat(2048));
    assert!(with_policy(&huge).await.text("Message").contains("less than or equal to 2048"));
    let fitting = with_policy(r#"{"Version": "2012-10-17", "Statement": []}"#).await;
    assert_eq!(fitting.text("PackedPolicySize"), "3");
}

#[tokio::test]
async fn a_source_identity_stays_through_a_chain() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let with_identity = async |client: &Client, identity: &str| {
        let members =
            [("RoleArn", READ), ("RoleSessionName", "run-1"), ("SourceIdentity", identity)];
        client.sts("AssumeRole", &members).await
    };
    let first = with_identity(&user, "alice").await;
    assert_eq!(first.text("SourceIdentity"), "alice");
    let role = user.with_session(&first);
    assert_eq!(role.assume(READ).await.text("SourceIdentity"), "alice");
    with_identity(&role, "bob").await.assert_refused(
        400,
        "ValidationError",
        "The source identity is already set for this assume role session",
    );
}

#[tokio::test]
async fn what_is_required_must_be_there() {
    let simulator = start().await;
    let answer = Client::of(&simulator).sts("AssumeRole", &[("RoleArn", DEPLOY)]).await;
    answer.assert_refused(
        400,
        "ValidationError",
        "1 validation error detected: Value null at 'roleSessionName' failed to satisfy \
         constraint: Member must not be null",
    );
}

#[tokio::test]
async fn unsigned_and_half_signed_requests_are_refused() {
    let simulator = start().await;
    let host = ("host".to_owned(), simulator.address().to_string());
    let body = b"Action=GetCallerIdentity&Version=2011-06-15";
    let unsigned =
        exchange(simulator.address(), "POST", "/", std::slice::from_ref(&host), body).await;
    unsigned.unwrap().assert_refused(
        403,
        "MissingAuthenticationToken",
        "Request is missing Authentication Token",
    );
    let half = ("authorization".to_owned(), "AWS4-HMAC-SHA256 Credential=AKIA".to_owned());
    let answer = exchange(simulator.address(), "POST", "/", &[host, half], body).await.unwrap();
    assert_eq!(answer.text("Code"), "IncompleteSignature");
}

#[tokio::test]
async fn an_action_that_is_not_simulated_is_said_to_be_unknown() {
    let simulator = start().await;
    Client::of(&simulator).sts("GetFederationToken", &[]).await.assert_refused(
        400,
        "InvalidAction",
        "Could not find operation GetFederationToken for version 2011-06-15",
    );
}

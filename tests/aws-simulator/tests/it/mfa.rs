//! Codes and the mark they leave: what each kind of session may do with it.

use jiff::SignedDuration;
use latchkey_aws_simulator::{Device, MfaCondition, Outcome, Role, Secret, User};

use crate::support::{ACCOUNT, Client, DEPLOY, READ, SERIAL, USER_ARN, start};

const REJECTED: &str = "MultiFactorAuthentication failed with invalid MFA one time pass code. ";
const UNABLE: &str = "MultiFactorAuthentication failed, unable to validate MFA code.  Please \
                      verify your MFA serial number is valid and associated with this user.";

fn denied(role: &str) -> String {
    format!("User: {USER_ARN} is not authorized to perform: sts:AssumeRole on resource: {role}")
}

#[tokio::test]
async fn the_mark_of_a_session_travels_into_a_later_assume_role() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let session = user.session(&simulator.code(SERIAL, 0).unwrap()).await;
    let expiry = session.text("Expiration");
    assert_eq!(expiry, "2027-01-15T20:00:00Z", "twelve hours unless asked otherwise");
    let role = user.with_session(&session).assume(DEPLOY).await;
    assert_eq!(role.text("Arn"), "arn:aws:sts::123456789012:assumed-role/deploy/run-1");
    assert!(role.text("AssumedRoleId").starts_with("AROA"));
    assert!(role.text("AccessKeyId").starts_with("ASIA"));
}

#[tokio::test]
async fn without_the_mark_a_role_that_demands_it_is_refused() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    user.assume(DEPLOY).await.assert_refused(403, "AccessDenied", &denied(DEPLOY));
    let plain = user.with_session(&user.sts("GetSessionToken", &[]).await);
    plain.assume(DEPLOY).await.assert_refused(403, "AccessDenied", &denied(DEPLOY));
    assert_eq!(plain.assume(READ).await.status, 200);
    assert_eq!(user.assume(READ).await.status, 200);
}

#[tokio::test]
async fn the_mark_does_not_travel_out_of_an_assumed_role() {
    let simulator = start().await;
    simulator.change_world(|world| {
        let mut chained = Role::new("chained", MfaCondition::Demanded);
        chained.trust.principals = vec![ACCOUNT.to_owned()];
        world.put_role(ACCOUNT, chained).unwrap();
    });
    let user = Client::of(&simulator);
    let chained = "arn:aws:iam::123456789012:role/chained";
    let session = user.with_session(&user.session(&simulator.code(SERIAL, 0).unwrap()).await);
    assert_eq!(session.assume(chained).await.status, 200);
    let role = user.with_session(&session.assume(DEPLOY).await);
    let refused = role.assume(chained).await;
    assert_eq!(refused.text("Code"), "AccessDenied");
    assert!(refused.text("Message").contains("assumed-role/deploy/run-1 is not authorized"));
}

#[tokio::test]
async fn assume_role_with_a_code_satisfies_the_trust_by_itself() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let code = simulator.code(SERIAL, 0).unwrap();
    let members = [
        ("RoleArn", DEPLOY),
        ("RoleSessionName", "run-1"),
        ("SerialNumber", SERIAL),
        ("TokenCode", &code),
    ];
    assert_eq!(user.sts("AssumeRole", &members).await.status, 200);
    // The code is spent for the other operation as well.
    user.session(&code).await.assert_refused(403, "AccessDenied", REJECTED);
    assert_eq!(simulator.requests_with_code(&code), 2);
}

#[tokio::test]
async fn wrong_old_and_used_codes_get_the_same_answer() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let code = simulator.code(SERIAL, -2).unwrap();
    assert_eq!(user.session(&code).await.status, 200);
    user.session(&code).await.assert_refused(403, "AccessDenied", REJECTED);
    let too_old = simulator.code(SERIAL, -3).unwrap();
    user.session(&too_old).await.assert_refused(403, "AccessDenied", REJECTED);
    let too_new = simulator.code(SERIAL, 3).unwrap();
    user.session(&too_new).await.assert_refused(403, "AccessDenied", REJECTED);
    assert_eq!(simulator.attempts_left(SERIAL), 5);
}

#[tokio::test]
async fn the_tenth_attempt_is_answered_as_if_the_device_were_unknown() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let code = simulator.code(SERIAL, 0).unwrap();
    assert_eq!(user.session(&code).await.status, 200);
    for _ in 0..8 {
        user.session(&code).await.assert_refused(403, "AccessDenied", REJECTED);
    }
    let fresh = simulator.unused_code(SERIAL).unwrap();
    user.session(&fresh).await.assert_refused(403, "AccessDenied", UNABLE);
    // Taking the device away and giving it back helps nobody.
    simulator.change_world(|world| {
        let seed = world.device(SERIAL).unwrap().seed.clone();
        world.remove_device(SERIAL).unwrap();
        let again = Device { serial: SERIAL.to_owned(), seed };
        world.put_device(ACCOUNT, "latchkey", again).unwrap();
    });
    user.session(&fresh).await.assert_refused(403, "AccessDenied", UNABLE);
    simulator.clock().advance(SignedDuration::from_secs(180));
    let later = Client::of(&simulator);
    assert_eq!(later.session(&simulator.code(SERIAL, 0).unwrap()).await.status, 200);
}

#[tokio::test]
async fn a_serial_that_is_not_the_users_device_is_not_validated() {
    let simulator = start().await;
    let theirs = "arn:aws:iam::123456789012:mfa/bob";
    simulator.change_world(|world| {
        let bob = User::with_key_and_device("aws", ACCOUNT, "bob");
        world.add_user(ACCOUNT, bob).unwrap();
    });
    let user = Client::of(&simulator);
    for serial in [theirs, USER_ARN, "GAHT00000000"] {
        let members = [("SerialNumber", serial), ("TokenCode", "123456")];
        let answer = user.sts("GetSessionToken", &members).await;
        answer.assert_refused(403, "AccessDenied", UNABLE);
    }
    assert_eq!(simulator.attempts_left(theirs), 9);
}

#[tokio::test]
async fn a_hardware_device_works_as_a_virtual_one() {
    let simulator = start().await;
    simulator.change_world(|world| {
        let token = Device { serial: "GAHT12345678".to_owned(), seed: Secret::default() };
        world.put_device(ACCOUNT, "latchkey", token).unwrap();
    });
    let code = simulator.code("GAHT12345678", 0).unwrap();
    let members = [("SerialNumber", "GAHT12345678"), ("TokenCode", code.as_str())];
    let answer = Client::of(&simulator).sts("GetSessionToken", &members).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn identities_are_named_as_aws_names_them() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let identity = user.sts("GetCallerIdentity", &[]).await;
    assert_eq!(identity.text("Arn"), USER_ARN);
    assert_eq!(identity.text("Account"), ACCOUNT);
    assert!(identity.text("UserId").starts_with("AIDA"));
    let session = user.with_session(&user.sts("GetSessionToken", &[]).await);
    assert_eq!(session.sts("GetCallerIdentity", &[]).await.text("Arn"), USER_ARN);
    let role = user.with_session(&user.assume(READ).await);
    let identity = role.sts("GetCallerIdentity", &[]).await;
    assert_eq!(identity.text("Arn"), "arn:aws:sts::123456789012:assumed-role/read/run-1");
    assert!(identity.text("UserId").ends_with(":run-1"));
    let calls = simulator.calls();
    assert_eq!(calls.len(), 5);
    assert!(calls.iter().all(|call| call.outcome == Outcome::Accepted && call.answered));
    assert_eq!(calls[0].caller.as_deref(), Some(USER_ARN));
}

#[tokio::test]
async fn a_get_request_is_understood_like_a_post() {
    let simulator = start().await;
    let target = "/?Action=GetCallerIdentity&Version=2011-06-15";
    let answer = Client::of(&simulator).send("sts", "GET", target, &[], b"").await.unwrap();
    assert_eq!(answer.text("Arn"), USER_ARN);
}

#[tokio::test]
async fn a_session_without_mfa_cannot_call_iam() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let session = user.with_session(&user.sts("GetSessionToken", &[]).await);
    let form_type = [("content-type", "application/x-www-form-urlencoded")];
    let body = b"Action=ListUsers&Version=2010-05-08";
    let answer = session.send("iam", "POST", "/", &form_type, body).await.unwrap();
    answer.assert_refused(
        403,
        "InvalidClientTokenId",
        "The security token included in the request is invalid.",
    );
}

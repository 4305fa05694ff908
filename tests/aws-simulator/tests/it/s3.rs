//! The bucket: who is let in, and the few operations terraform uses.

use crate::support::{Client, DEPLOY, READ, SERIAL, start};

#[tokio::test]
async fn objects_are_put_found_ranged_and_deleted() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let role = user.with_session(&user.assume(READ).await);
    let s3 = async |method: &str, target: &str, extra: &[(&str, &str)], body: &[u8]| {
        role.send("s3", method, target, extra, body).await.unwrap()
    };
    let state = "/latchkey-state/env%3A/prod/terraform.tfstate";
    assert_eq!(s3("HEAD", "/latchkey-state", &[], b"").await.status, 200);
    assert_eq!(s3("GET", state, &[], b"").await.text("Code"), "NoSuchKey");
    assert_eq!(s3("PUT", state, &[], b"0123456789").await.status, 200);
    let taken = s3("PUT", state, &[("if-none-match", "*")], b"other").await;
    assert_eq!((taken.status, taken.text("Code").as_str()), (412, "PreconditionFailed"));
    let whole = s3("GET", state, &[], b"").await;
    assert_eq!((whole.status, whole.body.as_str()), (200, "0123456789"));
    let head = s3("HEAD", state, &[], b"").await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert!(head.head.contains("content-length: 10"), "{}", head.head);
    let part = s3("GET", state, &[("range", "bytes=2-4")], b"").await;
    assert_eq!((part.status, part.body.as_str()), (206, "234"));
    assert!(part.head.contains("content-range: bytes 2-4/10"), "{}", part.head);
    let list = s3("GET", "/latchkey-state?list-type=2&prefix=env%3A%2F", &[], b"").await;
    assert_eq!(list.text("Key"), "env:/prod/terraform.tfstate");
    assert_eq!(s3("DELETE", state, &[], b"").await.status, 204);
    let list = s3("GET", "/latchkey-state?list-type=2&prefix=env%3A%2F", &[], b"").await;
    assert_eq!(list.text("KeyCount"), "0");
    assert_eq!(s3("GET", "/absent/key", &[], b"").await.text("Code"), "NoSuchBucket");
    assert_eq!(s3("PUT", "/latchkey-state/key?acl", &[], b"").await.status, 501);
}

#[tokio::test]
async fn only_sessions_of_the_named_roles_are_let_in() {
    let simulator = start().await;
    simulator.change_world(|world| world.buckets[0].allowed_roles = vec![DEPLOY.to_owned()]);
    let user = Client::of(&simulator);
    let session = user.with_session(&user.session(&simulator.code(SERIAL, 0).unwrap()).await);
    let other = user.with_session(&user.assume(READ).await);
    for client in [&user, &session, &other] {
        let answer = client.send("s3", "GET", "/latchkey-state/key", &[], b"").await.unwrap();
        assert_eq!((answer.status, answer.text("Code").as_str()), (403, "AccessDenied"));
    }
    let role = user.with_session(&session.assume(DEPLOY).await);
    let answer = role.send("s3", "PUT", "/latchkey-state/key", &[], b"x").await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(simulator.object("latchkey-state", "key").unwrap(), b"x");
    let wrong = Client { secret: "wrong".to_owned(), ..role };
    let answer = wrong.send("s3", "GET", "/latchkey-state/key", &[], b"").await.unwrap();
    assert_eq!(answer.text("Code"), "SignatureDoesNotMatch");
}

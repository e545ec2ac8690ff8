//! Users and groups of the guest, by name or number.

use std::io;

/// Whom a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) home: Option<String>,
}

/// `name`, `uid`, and either with `:group`.
pub(super) fn user(wanted: &str) -> io::Result<User> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    find(wanted, &read("/etc/passwd"), &read("/etc/group"))
}

fn find(wanted: &str, passwd: &str, group: &str) -> io::Result<User> {
    let (name, group_name) = wanted.split_once(':').map_or((wanted, None), |(name, group)| (name, Some(group)));
    let unknown = |what: &str| io::Error::new(io::ErrorKind::NotFound, format!("the guest has no {what}"));
    let lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = lines.clone().find(|fields| fields.len() > 5 && (fields[0] == name || fields[2] == name));
    let mut user = match (entry, name.parse()) {
        (Some(fields), _) => {
            let number = |field: &str| field.parse::<u32>().map_err(|_| unknown(&format!("valid entry for user {name}")));
            User { uid: number(fields[2])?, gid: number(fields[3])?, home: Some(fields[5].to_owned()) }
        }
        // A number needs no entry, as in containers.
        (None, Ok(uid)) => User { uid, gid: uid, home: None },
        (None, Err(_)) => return Err(unknown(&format!("user {name}"))),
    };
    if let Some(wanted) = group_name {
        let mut lines = group.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let entry = lines.find(|fields| fields.len() > 2 && (fields[0] == wanted || fields[2] == wanted));
        let number = entry.map_or(wanted, |fields| fields[2]).to_owned();
        user.gid = number.parse().map_err(|_| unknown(&format!("group {wanted}")))?;
    }
    Ok(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nsam:x:1000:1001::/home/sam:/bin/sh\nbroken:x\n";
        let group = "root:x:0:\nstaff:x:50:sam\n";
        let sam = User { uid: 1000, gid: 1001, home: Some("/home/sam".into()) };
        assert_eq!(find("sam", passwd, group).unwrap(), sam);
        assert_eq!(find("1000", passwd, group).unwrap(), sam);
        assert_eq!(find("sam:staff", passwd, group).unwrap().gid, 50);
        assert_eq!(find("7:8", passwd, group).unwrap(), User { uid: 7, gid: 8, home: None });
        find("nobody", passwd, group).unwrap_err();
        find("sam:none", passwd, group).unwrap_err();
        find("broken", passwd, group).unwrap_err();
    }
}

-- End a key; its record stays for a while, for the report of what it used. ARGV: now, id, kept for.
-- Returns 1, or 0 when there is no such key, or it was revoked.

local record = key('apikey', ARGV[2])
if call('HEXISTS', record, 'digest') == 0 then
  return 0
end
call('HDEL', record, 'digest', 'old_digest', 'old_until')
call('HSET', record, 'revoked', now_ms(ARGV[1]))
call('PEXPIRE', record, ARGV[3])
return 1

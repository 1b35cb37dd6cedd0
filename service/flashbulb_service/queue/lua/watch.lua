-- Name a waiting process in live jobs, so that their end is pushed to it. ARGV: instance, ids...
-- Returns their states in order, '' for one that is gone.

local ENDED = { done = true, failed = true, cancelled = true }
local states = {}
for i = 2, #ARGV do
  local job = call('HMGET', key('job', ARGV[i]), 'state', 'reply')
  states[#states + 1] = job[1] or ''
  if job[1] and not ENDED[job[1]] then
    local reply = ' ' .. (job[2] or '') .. ' '
    if not string.find(reply, ' ' .. ARGV[1] .. ' ', 1, true) then
      call('HSET', key('job', ARGV[i]), 'reply', (job[2] or '') .. ' ' .. ARGV[1])
    end
  end
end
return states
